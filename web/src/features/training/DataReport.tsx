import { ErrorNote } from '@/components/ErrorNote';
import { ApiError } from '@/lib/api';
import type { FileReport, Seen } from '@/types/api';
import { Skeleton, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import css from './DataReport.module.css';
import { fileReportQuery } from './queries';

interface Props {
  fileId: string;
  model: string | null;
  maxLength: number | null;
  trainOn: string | null;
}

/** What a chosen file holds, and how the chosen model reads it, as far as a gpu is there to tell. */
export function DataReport({ fileId, model, maxLength, trainOn }: Props) {
  const { t } = useTranslation();
  const plain = useQuery(fileReportQuery(fileId, null, null, null));
  const seen = useQuery({ ...fileReportQuery(fileId, model, maxLength, trainOn), enabled: model !== null });
  if (plain.isError) return <ErrorNote error={plain.error} retry={() => void plain.refetch()} />;
  if (!plain.data) return <Skeleton height={48} radius="md" />;
  const offline = seen.error instanceof ApiError && seen.error.status === 503;
  return (
    <section className={css.report} aria-label={t('data.report')}>
      <Text fw={600} size="sm">
        {t('data.report')}
      </Text>
      <Holds report={plain.data} />
      {offline ? <Text size="sm">{t('data.offline')}</Text> : null}
      {seen.error && !offline ? <ErrorNote error={seen.error} /> : null}
      {seen.data?.seen ? <AsSeen seen={seen.data.seen} whole={plain.data.rows} /> : null}
    </section>
  );
}

function useLines() {
  const { t } = useTranslation();
  return (lines: readonly number[], count: number) =>
    t(count > lines.length ? 'data.linesMore' : 'data.lines', { lines: lines.join(', ') });
}

function Holds({ report }: { report: FileReport }) {
  const { t } = useTranslation();
  const lines = useLines();
  const { rows, duplicates, duplicate_lines, errors, first_errors } = report;
  const twice =
    duplicates > 0
      ? t('data.duplicates', { count: duplicates, lines: lines(duplicate_lines, duplicates) })
      : t('data.noDuplicates');
  return (
    <>
      <Text size="sm">
        {t('data.rows', { count: rows })} · {twice}
      </Text>
      {first_errors.length > 0 ? (
        <div>
          <Text size="sm" fw={600}>
            {t('data.errors')}:{' '}
            {Object.entries(errors)
              .map(([code, n]) => `${code} (${n})`)
              .join(', ')}
          </Text>
          <ul className={css.lines}>
            {first_errors.map(({ line, message }) => (
              <li key={line}>
                <strong>{t('training.line', { line })}</strong> <span lang="en">{message}</span>
              </li>
            ))}
          </ul>
        </div>
      ) : null}
    </>
  );
}

function AsSeen({ seen, whole }: { seen: Seen; whole: number }) {
  const { t } = useTranslation();
  const lines = useLines();
  const limit = seen.max_length_tokens;
  return (
    <>
      <Lengths seen={seen} />
      {seen.rows < whole ? (
        <Text size="xs" c="dimmed">
          {t('data.sampled', { count: seen.rows })}
        </Text>
      ) : null}
      <Text size="sm" className={seen.truncated > 0 ? css.warm : undefined}>
        {seen.truncated > 0
          ? t('data.truncated', { count: seen.truncated, limit, lines: lines(seen.truncated_lines, seen.truncated) })
          : t('data.noTruncated', { limit })}
      </Text>
      {seen.nothing_to_learn > 0 ? (
        <Text size="sm" className={css.warm}>
          {t('data.nothing', {
            count: seen.nothing_to_learn,
            lines: lines(seen.nothing_to_learn_lines, seen.nothing_to_learn),
          })}
        </Text>
      ) : null}
      {seen.first_refused.map(({ line, message }) => (
        <Text key={line} size="sm" className={css.warm}>
          {t('data.refused', { line })} <span lang="en">{message}</span>
        </Text>
      ))}
      {seen.example ? (
        <div>
          <Text size="sm" fw={600}>
            {t('data.example')}
          </Text>
          <Text size="xs" c="dimmed">
            {t('data.exampleText', { line: seen.example.line })}
          </Text>
          <pre className={css.example} tabIndex={0} aria-label={t('data.example')}>
            {seen.example.parts.map(({ text, learned }, i) =>
              learned ? (
                <mark key={i}>
                  <span className={css.hidden}>[{t('data.learned')}] </span>
                  {text}
                </mark>
              ) : (
                <span key={i}>{text}</span>
              ),
            )}
          </pre>
        </div>
      ) : null}
    </>
  );
}

/** How long the rows are: half of them, nine of ten, all; and where they are cut. */
function Lengths({ seen: { tokens, max_length_tokens: limit } }: { seen: Seen }) {
  const { t } = useTranslation();
  const { shortest, p50, p90, longest } = tokens;
  const x = (length: number) => (100 * length) / Math.max(1, longest);
  return (
    <div>
      <Text size="sm" fw={600}>
        {t('data.lengths')}
      </Text>
      <svg
        className={css.lengths}
        viewBox="0 0 100 14"
        preserveAspectRatio="none"
        role="img"
        aria-label={t('data.lengthsPicture', { shortest, p50, longest })}
      >
        <rect className={css.whole} x={x(shortest)} width={x(longest) - x(shortest)} y={3} height={8} />
        <rect className={css.most} x={x(shortest)} width={x(p90) - x(shortest)} y={3} height={8} />
        <rect className={css.half} x={x(shortest)} width={x(p50) - x(shortest)} y={3} height={8} />
        {limit < longest ? <line className={css.limit} x1={x(limit)} x2={x(limit)} y1={0} y2={14} /> : null}
      </svg>
      <Text size="sm" c="dimmed">
        {t('data.lengthsText', { p50, p90, longest })} {limit < longest ? t('data.limit', { limit }) : null}
      </Text>
    </div>
  );
}

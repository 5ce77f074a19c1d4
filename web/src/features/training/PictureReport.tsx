import { ErrorNote } from '@/components/ErrorNote';
import type { PictureReport as Report } from '@/types/api';
import { Skeleton, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import css from './PictureReport.module.css';
import { pictureReportQuery } from './queries';

/** What a zip of pictures holds, and some of them. */
export function PictureReport({ fileId }: { fileId: string }) {
  const { t } = useTranslation();
  const report = useQuery(pictureReportQuery(fileId));
  if (report.isError) return <ErrorNote error={report.error} retry={() => void report.refetch()} />;
  if (!report.data) return <Skeleton height={48} radius="md" />;
  return (
    <section className={css.report} aria-label={t('data.report')}>
      <Text fw={600} size="sm">
        {t('data.report')}
      </Text>
      <Holds report={report.data} />
      {report.data.sample.length > 0 ? (
        <div>
          <Text fw={600} size="sm" mb={6}>
            {t('pictured.sample')}
          </Text>
          <ul className={css.sample} tabIndex={0} aria-label={t('pictured.sample')}>
            {report.data.sample.map(({ name, caption, width, height, thumbnail }) => (
              <li key={name}>
                <figure>
                  <img className={css.thumb} src={thumbnail} alt={`${name}: ${caption || t('pictured.noCaption')}`} />
                  <figcaption title={`${name} · ${width} × ${height}`}>{caption || name}</figcaption>
                </figure>
              </li>
            ))}
          </ul>
        </div>
      ) : null}
    </section>
  );
}

function Holds({ report }: { report: Report }) {
  const { t, i18n } = useTranslation();
  const { rows, captioned, formats, repaired, duplicates, duplicate_names, ignored, ignored_names } = report;
  const names = (some: readonly string[], count: number) =>
    count > some.length ? t('pictured.more', { names: some.join(', ') }) : some.join(', ');
  const mended = Object.entries(repaired).map(([what, n]) => {
    const key = `pictured.repaired_${what}`;
    return `${i18n.exists(key) ? t(key as 'pictured.repaired_grey') : what} (${n})`;
  });
  const sides = { smallest: report.smallest_side, median: report.median_side, largest: report.largest_side };
  return (
    <div>
      <Text size="sm">
        {[
          t('pictured.rows', { count: rows }),
          t(captioned > 0 ? 'pictured.allCaptioned' : 'pictured.noneCaptioned'),
          Object.entries(formats)
            .map(([format, n]) => `${n} ${format}`)
            .join(', '),
          duplicates > 0 ? null : t('data.noDuplicates'),
        ]
          .filter(Boolean)
          .join(' · ')}
      </Text>
      {report.smallest_side === null ? null : (
        <Text size="sm">
          {t(report.smallest_side === report.largest_side ? 'pictured.sidesSame' : 'pictured.sides', sides)}
        </Text>
      )}
      {mended.length > 0 ? (
        <Text size="sm">
          {t('pictured.repaired')}: {mended.join(', ')}
        </Text>
      ) : null}
      {duplicates > 0 ? (
        <Text size="sm" className={css.warm}>
          {t('pictured.duplicates', { count: duplicates, names: names(duplicate_names, duplicates) })}
        </Text>
      ) : null}
      {ignored > 0 ? (
        <Text size="sm" className={css.warm}>
          {t('pictured.ignored', { count: ignored, names: names(ignored_names, ignored) })}
        </Text>
      ) : null}
      <Faults report={report} />
    </div>
  );
}

/** Of a file that was checked by an older relay: a new one would not have been taken. */
function Faults({ report: { errors, first_errors: first } }: { report: Report }) {
  const { t } = useTranslation();
  if (first.length === 0) return null;
  return (
    <>
      <Text size="sm" fw={600}>
        {t('pictured.errors')}:{' '}
        {Object.entries(errors)
          .map(([code, n]) => `${code} (${n})`)
          .join(', ')}
      </Text>
      <ul className={css.faults}>
        {first.map(({ name, message }, i) => (
          <li key={i}>
            <strong>{name}</strong> <span lang="en">{message}</span>
          </li>
        ))}
      </ul>
    </>
  );
}

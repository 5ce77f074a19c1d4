import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card } from '@/components/Page';
import { percent } from '@/lib/format';
import type { DataKind, Job, Report } from '@/types/api';
import { Button, Text, Title } from '@mantine/core';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { downloadReport, reportQuery } from './queries';
import css from './ReportCard.module.css';
import { Picture } from './SamplePictures';

/** What the run has written about itself; nothing for runs of before there were reports. */
export function ReportCard({ job, kind }: { job: Job; kind: DataKind }) {
  const { t } = useTranslation();
  const report = useQuery(reportQuery(job.id)).data;
  const fetching = useMutation({ mutationFn: () => downloadReport(job.id) });
  if (!report) return null;
  const ofPictures = kind === 'pictures';
  return (
    <Card title={t('run.report')}>
      {ofPictures ? null : <Perplexity report={report} />}
      <Answers report={report} ofPictures={ofPictures} />
      <Changes report={report} />
      <Text size="sm" c="dimmed">
        {t(ofPictures ? 'pictured.reportText' : 'run.reportText')}
      </Text>
      {fetching.error ? <ErrorNote error={fetching.error} retry={() => fetching.mutate()} /> : null}
      <Button
        variant="default"
        leftSection={<Icon name="download" size={16} />}
        loading={fetching.isPending}
        onClick={() => fetching.mutate()}
        style={{ alignSelf: 'flex-start' }}
      >
        {t('run.reportDownload')}
      </Button>
    </Card>
  );
}

function Perplexity({ report: { perplexity } }: { report: Report }) {
  const { t } = useTranslation();
  if (!perplexity || (perplexity.before === null && perplexity.after === null)) return null;
  return (
    <dl className={css.pair}>
      {(['before', 'after'] as const).map((when) => (
        <div key={when}>
          <dt>{t(when === 'before' ? 'run.perplexityBefore' : 'run.perplexityAfter')}</dt>
          <dd>{perplexity[when]?.toFixed(2) ?? '–'}</dd>
        </div>
      ))}
    </dl>
  );
}

function Answers({ report: { answers }, ofPictures }: { report: Report; ofPictures: boolean }) {
  const { t } = useTranslation();
  if (answers.length === 0) return null;
  const told = (answer: string, alt: string) =>
    ofPictures ? <Picture answer={answer} alt={alt} /> : answer || t('run.samplesEmpty');
  return (
    <section>
      <Title order={3}>{t(ofPictures ? 'pictured.answers' : 'run.answers')}</Title>
      {answers.map(({ prompt, before, after }, i) => (
        <div key={i} className={css.answer}>
          <Text fw={600}>{prompt}</Text>
          <dl className={css.pair}>
            <div>
              <dt>{t('run.before')}</dt>
              <dd className={css.said}>{told(before, `${prompt}: ${t('run.before')}`)}</dd>
            </div>
            <div>
              <dt>{t('run.after')}</dt>
              <dd className={css.said}>{told(after, `${prompt}: ${t('run.after')}`)}</dd>
            </div>
          </dl>
        </div>
      ))}
    </section>
  );
}

/** A bar for each layer that was trained. */
function Changes({ report: { changes } }: { report: Report }) {
  const { t } = useTranslation();
  const layers = changes?.layers ?? [];
  const most = layers.reduce(
    (best, each) => (each.relative_change > (best?.relative_change ?? 0) ? each : best),
    layers[0],
  );
  if (!most || (layers.length === 1 && most.layer === null)) return null; // of layers there is nothing to tell
  const nameOf = (layer: number | string | null) => (layer === null ? t('run.outside') : String(layer));
  return (
    <section>
      <Title order={3}>{t('run.changes')}</Title>
      <Text size="sm" c="dimmed" mb="xs">
        {t('run.changesText')}{' '}
        {t('run.changesSummary', { layer: nameOf(most.layer), share: percent(most.relative_change) })}
      </Text>
      <ul className={css.bars}>
        {layers.map(({ layer, relative_change: share }) => (
          <li key={String(layer)}>
            <span>{nameOf(layer)}</span>
            <svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
              <rect width={most.relative_change > 0 ? (100 * share) / most.relative_change : 0} height={6} />
            </svg>
            <span>{percent(share)}</span>
          </li>
        ))}
      </ul>
    </section>
  );
}

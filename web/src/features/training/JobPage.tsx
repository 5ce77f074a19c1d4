import { BackLink } from '@/components/BackLink';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { NotifyOffer } from '@/features/notify/NotifyOffer';
import { ApiError } from '@/lib/api';
import { duration } from '@/lib/format';
import type { Job } from '@/types/api';
import { Alert, Anchor, Button, Group, Progress as Bar, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useEffect, useMemo, useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useParams } from 'react-router';
import { Again, Cancel, Pause, Slower } from './JobActions';
import { Events } from './JobEvents';
import { Facts } from './JobFacts';
import css from './JobPage.module.css';
import { LossChart } from './LossChart';
import { isOpen, progressOf, type Progress } from './progress';
import { checkpointsQuery } from './queries';
import { ReportCard } from './ReportCard';
import { SampleAnswers } from './SampleAnswers';
import { StatusBadge } from './StatusBadge';
import { useJobStream } from './useJobStream';
import { hasVitals, Vitals } from './Vitals';

export function JobPage() {
  const { t } = useTranslation();
  const { id = '' } = useParams();
  const { job, events, connected, error } = useJobStream(id);
  const progress = useMemo(() => progressOf(events), [events]);
  const back = <BackLink to="/training">{t('job.allJobs')}</BackLink>;
  if (error || !job) {
    return (
      <Page title={t('training.title')} above={back}>
        {error ? <ErrorNote error={error} /> : <Text c="dimmed">{t('app.loading', { what: id })}</Text>}
      </Page>
    );
  }
  return (
    <Page
      title={t('job.title', { name: job.user_provided_suffix ?? t('job.untitled') })}
      above={back}
      actions={
        isOpen(job) ? (
          <Group gap="sm">
            <Pause job={job} />
            <Cancel job={job} />
          </Group>
        ) : (
          <Group gap="sm">
            <Slower job={job} />
            <Again job={job} />
          </Group>
        )
      }
    >
      <div className={css.cards}>
        <State job={job} progress={progress} connected={connected} />
        <Card title={t('job.loss')}>
          <Text size="sm" c="dimmed" mt={-10}>
            {t('job.lossText')}
          </Text>
          {progress.train.length > 0 ? (
            <LossChart train={progress.train} valid={progress.valid} totalSteps={progress.totalSteps} />
          ) : (
            <Text c="dimmed" className={css.noLoss}>
              {isOpen(job) ? t('job.noLoss') : t('job.noSteps')}
            </Text>
          )}
        </Card>
        {hasVitals(progress) ? (
          <Card title={t(isOpen(job) ? 'run.vitals' : 'run.vitalsEnded')}>
            <Vitals progress={progress} />
          </Card>
        ) : null}
        {progress.samples.length > 0 || (isOpen(job) && job.sample_prompts.length > 0) ? (
          <Card title={t('run.samples')}>
            {progress.samples.length > 0 ? (
              <SampleAnswers samples={progress.samples} />
            ) : (
              <Text c="dimmed">{t('run.samplesNone')}</Text>
            )}
          </Card>
        ) : null}
        {job.status === 'succeeded' ? <ReportCard job={job} /> : null}
        <Card title={t('job.settings')}>
          <Facts job={job} progress={progress} />
        </Card>
        <Card title={t('job.events')}>
          <Events events={events} />
        </Card>
      </div>
    </Page>
  );
}

function State({ job, progress, connected }: { job: Job; progress: Progress; connected: boolean }) {
  const { t, i18n } = useTranslation();
  const eta = useCountdown(job.estimated_finish);
  const { step, totalSteps } = progress;
  return (
    <section className={css.state} aria-live="polite">
      <Group justify="space-between" gap="sm">
        <StatusBadge job={job} />
        {isOpen(job) ? (
          <Text size="xs" c="dimmed">
            {connected ? t('job.live') : t('job.offline')}
          </Text>
        ) : (
          <Text size="sm" c="dimmed">
            {t('job.took', { time: duration((job.finished_at ?? 0) - job.created_at, i18n.language) })}
          </Text>
        )}
      </Group>
      {job.status === 'queued' ? <Waiting job={job} /> : null}
      {job.pausing ? <Text>{t('job.pausing')}</Text> : null}
      {job.status === 'paused' ? <Text>{t('job.paused')}</Text> : null}
      {job.status === 'running' && step === null ? <Text>{t('job.starting')}</Text> : null}
      {step !== null && totalSteps ? (
        <div>
          <Group justify="space-between" mb={6}>
            <Text fw={600}>{t('job.progress', { step, total: totalSteps })}</Text>
            {eta !== null && job.status === 'running' && !job.pausing ? (
              <Text c="dimmed">{t('job.eta', { time: duration(eta, i18n.language) })}</Text>
            ) : null}
          </Group>
          <Bar
            value={(100 * step) / totalSteps}
            size="lg"
            aria-label={t('job.progress', { step, total: totalSteps })}
          />
        </div>
      ) : null}
      {isOpen(job) ? <Kept job={job} /> : null}
      {isOpen(job) ? <NotifyOffer /> : null}
      {job.status === 'succeeded' && job.fine_tuned_model ? (
        <Alert color="fern" variant="light" title={t('job.doneTitle')} icon={<Icon name="check" />}>
          <Text size="sm">{t('job.doneText', { model: job.fine_tuned_model })}</Text>
          <Button
            component={Link}
            to={`/?model=${encodeURIComponent(job.fine_tuned_model)}`}
            mt="sm"
            leftSection={<Icon name="chat" />}
          >
            {t('job.chat')}
          </Button>
        </Alert>
      ) : null}
      {job.error ? <ErrorNote error={new ApiError(job.error.message, 0, 'training')} /> : null}
    </section>
  );
}

/** Why a queued job has not begun, and what would help. */
function Waiting({ job }: { job: Job }) {
  const { t, i18n } = useTranslation();
  const model = job.model.split('/').at(-1);
  const key = `job.waiting_${job.waiting_for?.reason}`;
  const known = i18n.exists(key);
  return (
    <Text>
      {known ? t(key as 'job.waiting_no_gpu', { model }) : t('job.waiting', { model })}{' '}
      {job.waiting_for?.reason === 'no_gpu' || job.waiting_for?.reason === 'model_not_offered' ? (
        <Anchor component={Link} to="/gpus">
          {t('generate.connect')}
        </Anchor>
      ) : null}
    </Text>
  );
}

/** From where it would go on. */
function Kept({ job }: { job: Job }) {
  const { t } = useTranslation();
  const steps = useQuery(checkpointsQuery(job.id)).data;
  if (!steps?.length) return null;
  return (
    <Text size="sm" c="dimmed">
      {t('job.checkpoints', { count: steps.length, step: steps[0] })}
    </Text>
  );
}

/** Seconds until then, counted down between reports. */
function useCountdown(until: number | null): number | null {
  const [now, setNow] = useState(() => Date.now() / 1000);
  useEffect(() => {
    if (until === null) return undefined;
    const timer = setInterval(() => setNow(Date.now() / 1000), 1000);
    return () => clearInterval(timer);
  }, [until]);
  return until === null ? null : Math.max(0, until - now);
}

import { BackLink } from '@/components/BackLink';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { NotifyOffer } from '@/features/notify/NotifyOffer';
import { ApiError } from '@/lib/api';
import { duration } from '@/lib/format';
import { modelsQuery } from '@/features/generate/queries';
import type { DataKind, Job } from '@/types/api';
import { Alert, Button, Group, Progress as Bar, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useEffect, useMemo, useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useParams } from 'react-router';
import { Again, CancelJob, PauseJob, Slower } from './JobActions';
import { Events } from './JobEvents';
import { Facts } from './JobFacts';
import css from './JobPage.module.css';
import { LossChart } from './LossChart';
import { kindOf } from './ModelChoice';
import { isOpen, progressOf, type Progress } from './progress';
import { checkpointsQuery } from './queries';
import { ReportCard } from './ReportCard';
import { SampleAnswers } from './SampleAnswers';
import { SamplePictures } from './SamplePictures';
import { arePictures } from './samples';
import { StatusBadge } from './StatusBadge';
import { useJobStream } from './useJobStream';
import { hasVitals, Vitals } from './Vitals';
import { Waiting } from './Waiting';

export function JobPage() {
  const { t } = useTranslation();
  const { id = '' } = useParams();
  const { job, events, connected, error } = useJobStream(id);
  const progress = useMemo(() => progressOf(events), [events]);
  const kind = useKind(job, progress);
  const ofPictures = kind === 'pictures';
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
            <PauseJob job={job} />
            <CancelJob job={job} kind={kind} />
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
        <State job={job} progress={progress} connected={connected} ofPictures={ofPictures} />
        <Card title={t(ofPictures ? 'pictured.loss' : 'job.loss')}>
          <Text size="sm" c="dimmed" mt={-10}>
            {t(ofPictures ? 'pictured.lossText' : 'job.lossText')}
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
            <Vitals progress={progress} kind={kind} />
          </Card>
        ) : null}
        {progress.samples.length > 0 || (isOpen(job) && job.sample_prompts.length > 0) ? (
          <Card title={t(ofPictures ? 'pictured.samples' : 'run.samples')}>
            {arePictures(progress.samples) ? (
              <SamplePictures samples={progress.samples} />
            ) : progress.samples.length > 0 ? (
              <SampleAnswers samples={progress.samples} />
            ) : (
              <Text c="dimmed">{t(ofPictures ? 'pictured.samplesNone' : 'run.samplesNone')}</Text>
            )}
          </Card>
        ) : null}
        {job.status === 'succeeded' ? <ReportCard job={job} kind={kind} /> : null}
        <Card title={t('job.settings')}>
          <Facts job={job} progress={progress} kind={kind} />
        </Card>
        <Card title={t('job.events')}>
          <Events events={events} steps={t('job.step')} />
        </Card>
      </div>
    </Page>
  );
}

/** What it learns from: its model says so, and where that is gone, what the gpu chose for it. */
function useKind(job: Job | null, progress: Progress): DataKind {
  const model = useQuery(modelsQuery).data?.find((each) => each.id === job?.model);
  if (model) return kindOf(model);
  return job?.concept || typeof progress.chosen['resolution'] === 'number' ? 'pictures' : 'text';
}

interface StateProps {
  job: Job;
  progress: Progress;
  connected: boolean;
  ofPictures: boolean;
}

function State({ job, progress, connected, ofPictures }: StateProps) {
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
      {job.status === 'running' && step === null ? (
        <Text>{t(ofPictures ? 'pictured.preparing' : 'job.starting')}</Text>
      ) : null}
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
          <Text size="sm">{t(ofPictures ? 'pictured.doneText' : 'job.doneText', { model: job.fine_tuned_model })}</Text>
          <Button
            component={Link}
            to={`/?${tryingIt(job.fine_tuned_model, ofPictures ? promptOf(job) : undefined)}`}
            mt="sm"
            leftSection={<Icon name={ofPictures ? 'spark' : 'chat'} />}
          >
            {t(ofPictures ? 'pictured.tryIt' : 'job.chat')}
          </Button>
        </Alert>
      ) : null}
      {job.error ? <ErrorNote error={new ApiError(job.error.message, 0, 'training')} /> : null}
    </section>
  );
}

/** What the generate screen shall begin with. */
const tryingIt = (model: string, prompt = ''): URLSearchParams =>
  new URLSearchParams({ model, ...(prompt ? { prompt } : {}) });

const promptOf = (job: Job): string | undefined => job.concept?.prompt ?? job.sample_prompts[0];

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

import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { gpusQuery } from '@/features/gpus/queries';
import { ApiError } from '@/lib/api';
import { clockTime, duration } from '@/lib/format';
import type { Job, JobEvent } from '@/types/api';
import { Alert, Anchor, Button, Group, Modal, Progress as Bar, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation, useQuery } from '@tanstack/react-query';
import { useEffect, useMemo, useState, type ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { Link, useNavigate, useParams } from 'react-router';
import css from './JobPage.module.css';
import { LossChart } from './LossChart';
import { isOpen, progressOf, type Progress } from './progress';
import { cancelJob, checkpointsQuery, fileQuery, pauseJob, resumeJob } from './queries';
import { StatusBadge } from './StatusBadge';
import { useJobStream } from './useJobStream';

export function JobPage() {
  const { t } = useTranslation();
  const { id = '' } = useParams();
  const { job, events, connected, error } = useJobStream(id);
  const progress = useMemo(() => progressOf(events), [events]);
  const back = (
    <Anchor component={Link} to="/training" size="sm" className={css.back}>
      <Icon name="left" size={18} /> {t('job.allJobs')}
    </Anchor>
  );
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
          <Again job={job} />
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
      {job.status === 'queued' ? <Text>{t('job.waiting', { model: job.model.split('/').at(-1) })}</Text> : null}
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

function Facts({ job, progress }: { job: Job; progress: Progress }) {
  const { t } = useTranslation();
  const file = useQuery(fileQuery(job.training_file));
  const gpus = useQuery({ ...gpusQuery, refetchInterval: false });
  const gpu = gpus.data?.find((each) => each.id === job.gpu);
  const hyper = (name: string) => {
    const value = job.hyperparameters[name];
    return typeof value === 'number' ? Number(value.toPrecision(4)).toString() : t('training.auto');
  };
  const rows: [string, ReactNode][] = [
    [t('training.stepModel'), job.model],
    [
      t('job.examples'),
      file.data ? `${file.data.filename} · ${t('training.rows', { count: file.data.rows })}` : job.training_file,
    ],
    [
      t('training.layers'),
      job.layers.map((spec, i) => (
        <div key={i}>
          {spec.method === 'lora' ? `LoRA ${spec.rank ?? ''}` : t('training.method_full')} · {spec.parts.join(', ')} ·{' '}
          {spec.layers}
          {spec.match ? ` · ${spec.match}` : ''}
        </div>
      )),
    ],
    [t('training.epochs'), hyper('n_epochs')],
    [t('training.batch'), hyper('batch_size')],
    [t('training.rate'), hyper('learning_rate')],
    [t('training.length'), hyper('max_length_tokens')],
    ...(job.gpu ? [[t('job.gpu'), gpu?.name ?? job.gpu] as [string, ReactNode]] : []),
    ...(job.attempts > 0 ? [[t('job.attempts'), job.attempts] as [string, ReactNode]] : []),
    ...(progress.tokens ? [[t('job.tokens'), progress.tokens.toLocaleString()] as [string, ReactNode]] : []),
  ];
  return (
    <dl className={css.facts}>
      {rows.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

/** What a person would want to know first; every step's line is folded away. */
function Events({ events }: { events: readonly JobEvent[] }) {
  const { t, i18n } = useTranslation();
  const told = events.filter((event) => event.type !== 'metrics' || event.level !== 'info');
  const steps = events.filter((event) => event.type === 'metrics').slice(-200);
  const line = (event: JobEvent) => (
    <li key={event.id} data-level={event.level}>
      <time dateTime={new Date(event.created_at * 1000).toISOString()}>
        {clockTime(event.created_at, i18n.language)}
      </time>
      <span lang="en">{event.message}</span>
    </li>
  );
  return (
    <>
      <ol className={css.events}>{told.map(line)}</ol>
      {steps.length > 0 ? (
        <Fold title={`${t('job.step')} (${steps.length})`}>
          <ol className={`${css.events} ${css.steps}`} tabIndex={0} aria-label={t('job.step')}>
            {steps.map(line).reverse()}
          </ol>
        </Fold>
      ) : null}
    </>
  );
}

/** Or its opposite. The stream tells what comes of it. */
function Pause({ job }: { job: Job }) {
  const { t } = useTranslation();
  const goesOn = job.pausing || job.status === 'paused';
  const changing = useMutation({ mutationFn: goesOn ? resumeJob : pauseJob });
  return (
    <>
      {changing.error ? <ErrorNote error={changing.error} /> : null}
      <Button variant="default" loading={changing.isPending} onClick={() => changing.mutate(job.id)}>
        {t(goesOn ? 'job.resume' : 'job.pause')}
      </Button>
    </>
  );
}

function Cancel({ job }: { job: Job }) {
  const { t } = useTranslation();
  const [opened, modal] = useDisclosure(false);
  const cancelling = useMutation({ mutationFn: cancelJob, onSuccess: modal.close });
  return (
    <>
      <Button variant="default" onClick={modal.open}>
        {t('job.cancel')}
      </Button>
      <Modal
        opened={opened}
        onClose={modal.close}
        title={t('job.cancelTitle')}
        centered
        closeButtonProps={{ 'aria-label': t('app.close') }}
      >
        <Text size="sm">{t('job.cancelText')}</Text>
        {cancelling.error ? <ErrorNote error={cancelling.error} /> : null}
        <Group justify="flex-end" mt="lg">
          <Button variant="default" onClick={modal.close} data-autofocus>
            {t('job.cancelNo')}
          </Button>
          <Button
            color="red.8"

            loading={cancelling.isPending}
            onClick={() => cancelling.mutate(job.id)}
          >
            {t('job.cancelYes')}
          </Button>
        </Group>
      </Modal>
    </>
  );
}

function Again({ job }: { job: Job }) {
  const { t } = useTranslation();
  const navigate = useNavigate();
  return (
    <Button
      variant="default"
      leftSection={<Icon name="retry" />}
      onClick={() => void navigate('/training/new', { state: { again: job } })}
    >
      {t('job.again')}
    </Button>
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

import { BackLink } from '@/components/BackLink';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { gpusQuery } from '@/features/gpus/queries';
import { NotifyOffer } from '@/features/notify/NotifyOffer';
import { Cancel, Pause } from '@/features/training/JobActions';
import { Events } from '@/features/training/JobEvents';
import css from '@/features/training/JobPage.module.css';
import { Waiting } from '@/features/training/Waiting';
import { ApiError } from '@/lib/api';
import { count, dateTime, duration, until } from '@/lib/format';
import type { Batch } from '@/types/api';
import { Button, Group, Text } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { useNavigate, useParams } from 'react-router';
import { BatchBadge } from './BatchBadge';
import { Counts } from './Counts';
import { nameOf } from './name';
import { batchEventsQuery, batchQuery, cancelBatch, downloadFile, pauseBatch, resumeBatch } from './queries';
import { endedAt, isOpen, isRunning, stateOf, unanswered } from './state';

export function BatchPage() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const { id = '' } = useParams();
  const batch = useQuery(batchQuery(id));
  const over = batch.data !== undefined && !isOpen(batch.data);
  const events = useQuery(batchEventsQuery(id, over)).data ?? [];
  const back = <BackLink to="/batches">{t('batches.all')}</BackLink>;
  if (!batch.data) {
    return (
      <Page title={t('batches.title')} above={back}>
        {batch.error ? <ErrorNote error={batch.error} retry={() => void batch.refetch()} /> : null}
        {batch.isPending ? <Text c="dimmed">{t('app.loading', { what: id })}</Text> : null}
      </Page>
    );
  }
  const found = batch.data;
  return (
    <Page
      title={nameOf(found) ?? t('batches.untitled')}
      above={back}
      actions={
        isRunning(found) ? (
          <Acts batch={found} />
        ) : over ? (
          <Button
            variant="default"
            leftSection={<Icon name="retry" />}
            onClick={() => void navigate('/batches/new', { state: { file: found.input_file_id } })}
          >
            {t('batches.again')}
          </Button>
        ) : null
      }
    >
      <div className={css.cards}>
        <State batch={found} offline={batch.isRefetchError} />
        {found.output_file_id || found.error_file_id ? <Files batch={found} /> : null}
        <Card title={t('job.settings')}>
          <Facts batch={found} />
        </Card>
        <Card title={t('job.events')}>
          <Events events={events} steps={t('batches.steps')} />
        </Card>
      </div>
    </Page>
  );
}

function Acts({ batch }: { batch: Batch }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const goesOn = batch.paused || batch.pausing;
  const told = async (telling: Promise<Batch>) => {
    const after = await telling;
    queryClient.setQueryData(batchQuery(batch.id).queryKey, after);
  };
  return (
    <Group gap="sm">
      <Pause goesOn={goesOn} act={() => told(goesOn ? resumeBatch(batch.id) : pauseBatch(batch.id))} />
      <Cancel
        open={t('batches.cancel')}
        title={t('batches.cancelTitle')}
        text={t('batches.cancelText')}
        act={() => told(cancelBatch(batch.id))}
      />
    </Group>
  );
}

function State({ batch, offline }: { batch: Batch; offline: boolean }) {
  const { t, i18n } = useTranslation();
  const state = stateOf(batch);
  const ended = endedAt(batch);
  const [why] = batch.errors?.data ?? [];
  const left = unanswered(batch);
  return (
    <section className={css.state}>
      <Group justify="space-between" gap="sm">
        <div role="status">
          <BatchBadge batch={batch} />
        </div>
        <Text size={isOpen(batch) ? 'xs' : 'sm'} c="dimmed">
          {ended !== null
            ? t('job.took', { time: duration(ended - batch.created_at, i18n.language) })
            : t(offline ? 'job.offline' : 'job.live')}
        </Text>
      </Group>
      <Counts batch={batch} size="lg" />
      {state === 'waiting' ? <Waiting job={batch} /> : null}
      {state === 'pausing' || state === 'paused' || state === 'closing' ? <Text>{t(`batches.${state}`)}</Text> : null}
      {why ? <ErrorNote error={new ApiError(why.message, 0, why.code ?? 'batch')} /> : null}
      {isOpen(batch) ? <NotifyOffer /> : null}
      {!isOpen(batch) && left > 0 ? (
        <Text>
          {t('batches.left', { count: left })} {t('batches.leftDo')}
        </Text>
      ) : null}
    </section>
  );
}

function Files({ batch }: { batch: Batch }) {
  const { t } = useTranslation();
  const fetching = useMutation({
    mutationFn: ([id, what]: [string, string]) => downloadFile(id, `${batch.id}_${what}.jsonl`),
  });
  const { output_file_id: output, error_file_id: error } = batch;
  return (
    <Card title={t('batches.results')}>
      <Text size="sm" c="dimmed" mt={-10}>
        {t('batches.resultsText')}
      </Text>
      <Group gap="sm">
        {output ? (
          <Button
            leftSection={<Icon name="download" />}
            loading={fetching.isPending && fetching.variables[0] === output}
            onClick={() => fetching.mutate([output, 'output'])}
          >
            {t('batches.getOutput')}
          </Button>
        ) : null}
        {error ? (
          <Button
            variant="default"
            leftSection={<Icon name="download" />}
            loading={fetching.isPending && fetching.variables[0] === error}
            onClick={() => fetching.mutate([error, 'error'])}
          >
            {t('batches.getErrors')}
          </Button>
        ) : null}
      </Group>
      {fetching.error ? <ErrorNote error={fetching.error} /> : null}
    </Card>
  );
}

function Facts({ batch }: { batch: Batch }) {
  const { t, i18n } = useTranslation();
  const gpu = useQuery(gpusQuery).data?.find((each) => each.id === batch.gpu);
  const facts: [string, string][] = [
    [t('batches.model'), batch.model],
    [t('batches.endpoint'), batch.endpoint],
    [t('batches.started'), dateTime(batch.created_at, i18n.language)],
    [
      t('batches.window'),
      isOpen(batch) ? until(batch.expires_at, i18n.language) : dateTime(batch.expires_at, i18n.language),
    ],
    [
      t('batches.tokens'),
      t('batches.tokensText', { read: count(batch.usage.input_tokens), written: count(batch.usage.output_tokens) }),
    ],
    ...(gpu ? [[t('job.gpu'), gpu.name] as [string, string]] : []),
    ...(batch.attempts > 0 ? [[t('job.attempts'), String(batch.attempts)] as [string, string]] : []),
  ];
  return (
    <dl className={css.facts}>
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

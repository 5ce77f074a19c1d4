import { BackLink } from '@/components/BackLink';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { FilePicker } from '@/features/files/FilePicker';
import { filesQuery } from '@/features/files/queries';
import { useUpload } from '@/features/files/useUpload';
import { modelsQuery } from '@/features/generate/queries';
import css from '@/features/training/JobPage.module.css';
import { Alert, Button, Select, Text } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { useLocation, useNavigate } from 'react-router';
import { Example } from './Example';
import { named } from './name';
import { asksQuery, batchesQuery, createBatch } from './queries';

const WINDOWS_H = [1, 6, 24, 72, 168];

export function NewBatchPage() {
  const { t } = useTranslation();
  const navigate = useNavigate();
  const queryClient = useQueryClient();
  const from = useLocation().state as { file?: string } | null;
  const [wanted, setWanted] = useState<string | null>(from?.file ?? null);
  const [hours, setHours] = useState(24);
  const files = useQuery(filesQuery('batch')).data;
  const file = files?.find((each) => each.id === wanted); // one that a batch had may be deleted
  const uploading = useUpload('batch', (added) => setWanted(added.id));
  const asks = useQuery({ ...asksQuery(file?.id ?? ''), enabled: file !== undefined });
  const models = useQuery(modelsQuery).data;
  const model = models?.find((each) => each.id === asks.data?.model);
  const starting = useMutation({
    mutationFn: createBatch,
    onSuccess: async (batch) => {
      await queryClient.invalidateQueries({ queryKey: batchesQuery.queryKey });
      await navigate(`/batches/${batch.id}`);
    },
  });
  const good = asks.data && model && model.family !== 'sd' ? asks.data : null;
  return (
    <Page title={t('batches.new')} above={<BackLink to="/batches">{t('batches.all')}</BackLink>}>
      <form
        className={css.cards}
        onSubmit={(event) => {
          event.preventDefault();
          if (!file || !good) return;
          const window = `${hours}h`;
          const { endpoint } = good;
          starting.mutate({
            input_file_id: file.id,
            endpoint,
            completion_window: window,
            metadata: named(file.filename),
          });
        }}
      >
        <Card title={t('batches.file')}>
          <Text size="sm" c="dimmed" mt={-10}>
            {t('batches.fileText')}
          </Text>
          <FilePicker
            uploading={uploading}
            drop={t('training.drop')}
            choices={[{ label: t('training.choose'), accept: '.jsonl,application/jsonl' }]}
            rows={(count) => t('batches.rows', { count })}
            value={file?.id ?? null}
            onChange={setWanted}
          />
          <Fold title={t('batches.format')}>
            <Example />
          </Fold>
        </Card>
        {file ? (
          <Card title={t('batches.asks')}>
            {asks.error ? <ErrorNote error={asks.error} retry={() => void asks.refetch()} /> : null}
            {asks.isPending ? <Text c="dimmed">{t('training.checking', { name: file.filename })}</Text> : null}
            {asks.data ? (
              <dl className={css.facts} aria-live="polite">
                <Fact name={t('batches.rowsName')}>{t('batches.rows', { count: asks.data.rows })}</Fact>
                <Fact name={t('batches.model')}>{asks.data.model}</Fact>
                <Fact name={t('batches.endpoint')}>
                  {t(asks.data.endpoint === '/v1/completions' ? 'batches.completions' : 'batches.chat')}{' '}
                  <code>{asks.data.endpoint}</code>
                </Fact>
              </dl>
            ) : null}
            {asks.data && models && !good ? (
              <Alert color="red" variant="light" icon={<Icon name="warning" />} role="alert">
                {t(model ? 'batches.draws' : 'batches.noModel', { model: asks.data.model })}
              </Alert>
            ) : null}
            {good && !model?.available ? (
              <Text size="sm" c="dimmed" role="status">
                {t('batches.offline')}
              </Text>
            ) : null}
            <Select
              label={t('batches.window')}
              description={t('batches.windowText')}
              value={String(hours)}
              onChange={(value) => setHours(Number(value))}
              data={WINDOWS_H.map((h) => ({
                value: String(h),
                label: h < 48 ? t('batches.hours', { count: h }) : t('batches.days', { count: h / 24 }),
              }))}
              allowDeselect={false}
              maw={320}
            />
            {starting.error ? <ErrorNote error={starting.error} /> : null}
            <Button type="submit" disabled={!good} loading={starting.isPending} style={{ alignSelf: 'flex-start' }}>
              {t('batches.start')}
            </Button>
          </Card>
        ) : null}
      </form>
    </Page>
  );
}

function Fact({ name, children }: { name: string; children: React.ReactNode }) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

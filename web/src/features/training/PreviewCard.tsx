import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { ApiError } from '@/lib/api';
import { bytes, count, duration, percent } from '@/lib/format';
import type { Layers, Preview } from '@/types/api';
import { Text } from '@mantine/core';
import { keepPreviousData, useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import css from './PreviewCard.module.css';
import { previewQuery, type Training } from './queries';

interface Props {
  model: string | null;
  spec: Layers | null; // null: the form can't be read yet
  training: Training;
}

/** What the choice costs, before anything runs. The numbers stay, paler, while new ones are on their way. */
export function PreviewCard({ model, spec, training }: Props) {
  const { t } = useTranslation();
  const preview = useQuery({
    ...previewQuery(model ?? '', spec ?? { method: 'lora', parts: [], layers: '' }, training),
    enabled: model !== null && spec !== null,
    placeholderData: keepPreviousData,
  });
  if (!model || !spec) return <Text c="dimmed">{t('training.previewWait')}</Text>;
  if (preview.isError) {
    const offline = preview.error instanceof ApiError && preview.error.status === 503;
    return offline ? (
      <Text className={css.warm}>{t('training.previewOffline')}</Text>
    ) : (
      <ErrorNote error={preview.error} />
    );
  }
  if (!preview.data) return <Text c="dimmed">{t('app.loading', { what: t('training.preview') })}</Text>;
  return <Numbers preview={preview.data} stale={preview.isPlaceholderData} />;
}

const MEMORY = ['weights', 'gradients', 'optimizer', 'activations', 'adapter'] as const;

function Numbers({ preview, stale }: { preview: Preview; stale: boolean }) {
  const { t, i18n } = useTranslation();
  const total = preview.memory_bytes['total'] ?? 0;
  return (
    <div className={css.numbers} data-stale={stale} aria-live="polite" aria-busy={stale}>
      <div>
        <Text fw={650} size="lg">
          {t('training.tensors', {
            selected: preview.selected_tensors.toLocaleString(),
            total: preview.total_tensors.toLocaleString(),
          })}
        </Text>
        <Text size="sm" c="dimmed">
          {t('training.parameters', { count: count(preview.trainable_parameters) as unknown as number })},{' '}
          {t('training.ofModel', { share: percent(preview.trainable_parameters / preview.total_parameters) })}
        </Text>
      </div>
      <div>
        <Text fw={650}>{t('training.memory', { size: bytes(total) })}</Text>
        <svg className={css.bar} viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
          <Segments memory={preview.memory_bytes} total={total} />
        </svg>
        <ul className={css.legend}>
          {MEMORY.map((name) =>
            preview.memory_bytes[name] ? (
              <li key={name} data-part={name}>
                {t(`training.memory_${name}`)} <span>{bytes(preview.memory_bytes[name])}</span>
              </li>
            ) : null,
          )}
        </ul>
        <Text size="xs" c="dimmed" mt={4}>
          {preview.batch.width === undefined
            ? t('training.memoryBatch', { rows: preview.batch.rows, tokens: preview.batch.tokens })
            : t('pictured.memoryBatch', { count: preview.batch.rows, side: preview.batch.width })}
        </Text>
      </div>
      <OnDisk preview={preview} />
      {preview.time_s === undefined ? null : (
        <div>
          <Text fw={650}>{t('training.time', { time: duration(preview.time_s, i18n.language) })}</Text>
          {preview.chat_pause_s === undefined ? null : (
            <Text size="sm" c="dimmed">
              {t(preview.batch.width === undefined ? 'training.pause' : 'pictured.pause', {
                time: `${preview.chat_pause_s.toFixed(1)} s`,
              })}
            </Text>
          )}
        </div>
      )}
      {preview.notes.map((note) => (
        <Text key={note} size="sm" className={css.warm} lang="en">
          {note}
        </Text>
      ))}
      <Fold title={t('training.showTensors')}>
        <ul className={css.tensors} tabIndex={0} aria-label={t('training.showTensors')}>
          {preview.tensors.map((tensor) => (
            <li key={tensor.name}>
              <code>{tensor.name}</code> <span>{tensor.shape.join(' × ')}</span>
            </li>
          ))}
        </ul>
      </Fold>
    </div>
  );
}

/** What the run keeps beside the memory. */
function OnDisk({ preview: { prefix_bytes: prefix, checkpoint_bytes: checkpoint } }: { preview: Preview }) {
  const { t } = useTranslation();
  const told = [
    checkpoint ? t('training.checkpointBytes', { size: bytes(checkpoint) }) : null,
    prefix ? t('training.prefixBytes', { size: bytes(prefix) }) : null,
  ].filter(Boolean);
  if (told.length === 0) return null;
  return (
    <Text size="sm" c="dimmed">
      {told.join(' · ')}
    </Text>
  );
}

function Segments({ memory, total }: { memory: Record<string, number>; total: number }) {
  let at = 0;
  return MEMORY.map((name) => {
    const width = total > 0 ? (100 * (memory[name] ?? 0)) / total : 0;
    at += width;
    return <rect key={name} data-part={name} className={css.segment} x={at - width} width={width} y={0} height={8} />;
  });
}

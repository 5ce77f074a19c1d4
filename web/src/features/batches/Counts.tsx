import type { Batch } from '@/types/api';
import { Progress } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './Counts.module.css';

/** How many rows are answered, how many were refused, of how many; the bar says the same to the eye. */
export function Counts({ batch, size = 'sm' }: { batch: Batch; size?: 'sm' | 'lg' }) {
  const { t } = useTranslation();
  const { total, completed, failed } = batch.request_counts;
  return (
    <span>
      <span className={css.counts}>
        <span>{t('batches.answered', { completed, total })}</span>
        {failed > 0 ? <span className={css.failed}>{t('batches.failed', { count: failed })}</span> : null}
      </span>
      <Progress.Root component="span" display="flex" size={size} className={css.bar ?? ''} aria-hidden="true">
        <Progress.Section value={(100 * completed) / total} withAria={false} />
        <Progress.Section value={(100 * failed) / total} color="red" withAria={false} />
      </Progress.Root>
    </span>
  );
}

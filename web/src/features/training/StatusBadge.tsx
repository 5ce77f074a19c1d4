import type { Job } from '@/types/api';
import { useTranslation } from 'react-i18next';
import css from './StatusBadge.module.css';

export function StatusBadge({ job: { status, pausing } }: { job: Job }) {
  const { t } = useTranslation();
  return (
    <span className={css.badge} data-status={status}>
      <span className={css.dot} aria-hidden="true" />
      {t(pausing ? 'training.status_pausing' : `training.status_${status}`)}
    </span>
  );
}

import type { JobStatus } from '@/types/api';
import { useTranslation } from 'react-i18next';
import css from './StatusBadge.module.css';

export function StatusBadge({ status }: { status: JobStatus }) {
  const { t } = useTranslation();
  return (
    <span className={css.badge} data-status={status}>
      <span className={css.dot} aria-hidden="true" />
      {t(`training.status_${status}`)}
    </span>
  );
}

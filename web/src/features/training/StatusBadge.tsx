import { Status, type Tone } from '@/components/Status';
import type { Job, JobStatus } from '@/types/api';
import { useTranslation } from 'react-i18next';

const TONES: Record<JobStatus, Tone> = {
  queued: 'waiting',
  running: 'busy',
  paused: 'waiting',
  succeeded: 'good',
  failed: 'bad',
  cancelled: 'none',
};

export function StatusBadge({ job: { status, pausing } }: { job: Job }) {
  const { t } = useTranslation();
  return <Status tone={TONES[status]}>{t(pausing ? 'training.status_pausing' : `training.status_${status}`)}</Status>;
}

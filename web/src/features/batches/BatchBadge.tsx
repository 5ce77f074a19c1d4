import { Status } from '@/components/Status';
import type { Batch } from '@/types/api';
import { useTranslation } from 'react-i18next';
import { stateOf, TONES } from './state';

export function BatchBadge({ batch }: { batch: Batch }) {
  const { t } = useTranslation();
  const state = stateOf(batch);
  return <Status tone={TONES[state]}>{t(`batches.state_${state}`)}</Status>;
}

/** How a batch stands, in fewer words than the API has. No React, no network. */
import type { Tone } from '@/components/Status';
import type { Batch, BatchStatus } from '@/types/api';

const OVER: readonly BatchStatus[] = ['completed', 'expired', 'cancelled', 'failed'];

export const isOpen = ({ status }: Batch): boolean => !OVER.includes(status);

/** Rows may still be answered: it can be paused and cancelled. */
export const isRunning = ({ status }: Batch): boolean => status === 'validating' || status === 'in_progress';

export type State =
  'waiting' | 'answering' | 'pausing' | 'paused' | 'closing' | 'completed' | 'expired' | 'cancelled' | 'failed';

/** "In progress" is also what a batch is between two gpus; it waits then. */
export function stateOf(batch: Batch): State {
  const { status, paused, pausing, waiting_for: waits } = batch;
  if (status === 'finalizing' || status === 'cancelling') return 'closing';
  if (status === 'validating' || status === 'in_progress')
    return paused ? 'paused' : pausing ? 'pausing' : status === 'validating' || waits ? 'waiting' : 'answering';
  return status;
}

export const TONES: Record<State, Tone> = {
  waiting: 'waiting',
  answering: 'busy',
  pausing: 'busy',
  paused: 'waiting',
  closing: 'busy',
  completed: 'good',
  expired: 'bad',
  cancelled: 'none',
  failed: 'bad',
};

export const endedAt = (batch: Batch): number | null =>
  batch.completed_at ?? batch.failed_at ?? batch.expired_at ?? batch.cancelled_at;

/** Rows without any answer, once it has ended: they stand in the file of errors. */
export const unanswered = ({ request_counts: { total, completed, failed } }: Batch): number =>
  total - completed - failed;

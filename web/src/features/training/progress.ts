/** A job as it goes: what its events say about losses, steps and the time left. No React, no network. */
import type { Job, JobEvent } from '@/types/api';

export interface Point {
  step: number;
  loss: number;
}

export interface Progress {
  train: Point[];
  valid: Point[];
  step: number | null;
  totalSteps: number | null;
  etaS: number | null;
  tokens: number | null;
}

const number = (value: unknown): number | null => (typeof value === 'number' && Number.isFinite(value) ? value : null);

/** Events in their order. A job that began anew on another gpu counts from its start again, and so does the curve. */
export function progressOf(events: readonly JobEvent[]): Progress {
  const progress: Progress = { train: [], valid: [], step: null, totalSteps: null, etaS: null, tokens: null };
  for (const { type, data } of events) {
    if (type !== 'metrics') {
      progress.totalSteps = number(data['total_steps']) ?? progress.totalSteps;
      continue;
    }
    const step = number(data['step']);
    if (step === null) continue;
    if (progress.step !== null && step < progress.step) {
      progress.train = progress.train.filter((point) => point.step < step);
      progress.valid = progress.valid.filter((point) => point.step < step);
    }
    const train = number(data['train_loss']);
    const valid = number(data['full_valid_loss']);
    if (train !== null) progress.train.push({ step, loss: train });
    if (valid !== null) progress.valid.push({ step, loss: valid });
    progress.step = step;
    progress.totalSteps = number(data['total_steps']) ?? progress.totalSteps;
    progress.etaS = number(data['eta_s']);
    progress.tokens = number(data['tokens']);
  }
  return progress;
}

/** Exponential mean over about a tenth of the run, without the pull to zero of its start. */
export function smooth(points: readonly Point[]): Point[] {
  const weight = Math.min(0.95, Math.max(0, 1 - 10 / points.length));
  let sum = 0;
  let total = 0;
  return points.map(({ step, loss }) => {
    sum = weight * sum + loss;
    total = weight * total + 1;
    return { step, loss: sum / total };
  });
}

/** Adds what is new: streams may say an event again after a cut. */
export function merge(events: readonly JobEvent[], fresh: readonly JobEvent[]): JobEvent[] {
  const known = new Set(events.map((event) => event.id));
  return [...events, ...fresh.filter((event) => !known.has(event.id))];
}

export const isOpen = (job: Job): boolean => job.finished_at === null;

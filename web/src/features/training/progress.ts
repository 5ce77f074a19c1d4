/** A job as it goes: what its events say about losses, steps and the time left. No React, no network. */
import type { Job, JobEvent } from '@/types/api';
import { z } from 'zod';

export interface Point {
  step: number;
  loss: number;
}

/** What is told with a step beside its loss. */
export const READINGS = ['learning_rate', 'gradient_norm', 'tokens_per_s', 'memory_bytes', 'perplexity'] as const;
export type Reading = (typeof READINGS)[number];

export interface Value {
  step: number;
  value: number;
}

/** The answers to the sample prompts at one step. */
export interface Sampled {
  step: number;
  answers: { prompt: string; answer: string }[];
}

export interface Progress {
  train: Point[];
  valid: Point[];
  readings: Record<Reading, Value[]>;
  samples: Sampled[];
  chosen: Record<string, unknown>; // what "auto" has become
  step: number | null;
  totalSteps: number | null;
  etaS: number | null;
  seen: number | null; // tokens, or pictures
}

const number = (value: unknown): number | null => (typeof value === 'number' && Number.isFinite(value) ? value : null);
const answers = z.array(z.object({ prompt: z.string(), answer: z.string() }));

const nothing = (): Progress => ({
  train: [],
  valid: [],
  readings: { learning_rate: [], gradient_norm: [], tokens_per_s: [], memory_bytes: [], perplexity: [] },
  samples: [],
  chosen: {},
  step: null,
  totalSteps: null,
  etaS: null,
  seen: null,
});

/** Events in their order. A job that began anew on another gpu counts from its start again, and so does the curve. */
export function progressOf(events: readonly JobEvent[]): Progress {
  const progress = nothing();
  for (const { type, data } of events) {
    if (type === 'metrics') measure(progress, data);
    else {
      progress.totalSteps = number(data['total_steps']) ?? progress.totalSteps;
      const chosen = data['hyperparameters'];
      if (typeof chosen === 'object' && chosen !== null) progress.chosen = { ...chosen };
    }
  }
  return progress;
}

function measure(progress: Progress, data: JobEvent['data']): void {
  const step = number(data['step']);
  if (step === null) return;
  if (progress.step !== null && step < progress.step) backTo(progress, step);
  const train = number(data['train_loss'] ?? data['loss']);
  const valid = number(data['full_valid_loss'] ?? data['validation_loss']);
  if (train !== null) progress.train.push({ step, loss: train });
  if (valid !== null) progress.valid.push({ step, loss: valid });
  for (const name of READINGS) {
    const value = number(data[name] ?? (name === 'tokens_per_s' ? data['pictures_per_s'] : undefined));
    if (value !== null) progress.readings[name].push({ step, value });
  }
  const said = answers.safeParse(data['samples']);
  if (said.success && said.data.length > 0) progress.samples.push({ step, answers: said.data });
  progress.step = step;
  progress.totalSteps = number(data['total_steps']) ?? progress.totalSteps;
  progress.etaS = number(data['eta_s']) ?? progress.etaS;
  progress.seen = number(data['tokens'] ?? data['pictures']) ?? progress.seen;
}

function backTo(progress: Progress, step: number): void {
  const before = (each: { step: number }) => each.step < step;
  progress.train = progress.train.filter(before);
  progress.valid = progress.valid.filter(before);
  progress.samples = progress.samples.filter(before);
  for (const name of READINGS) progress.readings[name] = progress.readings[name].filter(before);
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

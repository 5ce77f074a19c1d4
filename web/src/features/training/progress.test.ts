import type { JobEvent } from '@/types/api';
import { expect, it } from 'vitest';
import { merge, progressOf, smooth } from './progress';

let n = 0;
const event = (type: string, data: Record<string, unknown>): JobEvent => ({
  id: `ftevent-${++n}`,
  created_at: n,
  level: 'info',
  type,
  message: '',
  data,
});
const step = (at: number, loss: number) =>
  event('metrics', { step: at, total_steps: 9, train_loss: loss, eta_s: 10 - at });

it('gathers losses, steps and the time left', () => {
  const progress = progressOf([
    event('message', { total_steps: 9 }),
    step(1, 3),
    step(2, 2.5),
    event('metrics', { step: 2, full_valid_loss: 2.7 }),
  ]);
  expect(progress).toMatchObject({
    train: [
      { step: 1, loss: 3 },
      { step: 2, loss: 2.5 },
    ],
    valid: [{ step: 2, loss: 2.7 }],
    step: 2,
    totalSteps: 9,
  });
});

it('draws the curve of a job that began anew once', () => {
  const { train } = progressOf([step(1, 3), step(2, 2.5), step(3, 2.2), step(1, 3), step(2, 2.4)]);
  expect(train.map((point) => point.step)).toEqual([1, 2]);
});

it('counts pictures as it counts tokens', () => {
  const progress = progressOf([
    event('metrics', { step: 1, train_loss: 0.4, pictures: 8, pictures_per_s: 2.5 }),
    event('metrics', { step: 2, train_loss: 0.3, pictures: 16 }),
  ]);
  expect(progress.seen).toBe(16);
  expect(progress.readings.tokens_per_s).toEqual([{ step: 1, value: 2.5 }]);
});

it('leaves out what is no number', () => {
  expect(progressOf([event('metrics', { step: 1, train_loss: 'NaN' })]).train).toEqual([]);
});

it('smooths from the first point on', () => {
  expect(smooth([{ step: 1, loss: 4 }])).toEqual([{ step: 1, loss: 4 }]);
  const flat = smooth([1, 2, 3].map((at) => ({ step: at, loss: 2 })));
  expect(flat.every((point) => Math.abs(point.loss - 2) < 1e-12)).toBe(true);
});

it('takes an event that was said twice once', () => {
  const events = [step(1, 1)];
  expect(merge(events, [...events, step(2, 1)])).toHaveLength(2);
});

it('keeps what is told beside the loss, the answers, and what "auto" has become', () => {
  const said = [{ prompt: 'Ahoy?', answer: 'Arr!' }];
  const progress = progressOf([
    event('message', { hyperparameters: { n_epochs: 3 }, total_steps: 9 }),
    event('metrics', {
      step: 1,
      train_loss: 3,
      learning_rate: 0.1,
      gradient_norm: 2,
      tokens_per_s: 50,
      memory_bytes: 7,
    }),
    event('metrics', { step: 2, validation_loss: 2.5, perplexity: 12.2, samples: said }),
    event('metrics', { step: 3, samples: 'no answers' }),
  ]);
  expect(progress.readings).toMatchObject({
    learning_rate: [{ step: 1, value: 0.1 }],
    tokens_per_s: [{ step: 1, value: 50 }],
    perplexity: [{ step: 2, value: 12.2 }],
  });
  expect(progress.samples).toEqual([{ step: 2, answers: said }]);
  expect(progress.chosen).toEqual({ n_epochs: 3 });
  expect(progress.valid).toEqual([{ step: 2, loss: 2.5 }]);
});

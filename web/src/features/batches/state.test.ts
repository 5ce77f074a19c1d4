import type { Batch } from '@/types/api';
import { expect, it } from 'vitest';
import { isOpen, isRunning, stateOf, unanswered } from './state';

const batch = (changes: Partial<Batch>): Batch =>
  ({ status: 'in_progress', paused: false, pausing: false, waiting_for: null, ...changes }) as Batch;

it('waits before its first gpu, and between two', () => {
  expect(stateOf(batch({ status: 'validating' }))).toBe('waiting');
  expect(stateOf(batch({ waiting_for: { reason: 'no_gpu', message: '' } }))).toBe('waiting');
  expect(stateOf(batch({}))).toBe('answering');
});

it('says that it is paused, for which the API has no status', () => {
  expect(stateOf(batch({ status: 'validating', paused: true }))).toBe('paused');
  expect(stateOf(batch({ pausing: true }))).toBe('pausing');
});

it('is open until its files are there, and runs until it has ended', () => {
  expect([isOpen(batch({ status: 'finalizing' })), isRunning(batch({ status: 'finalizing' }))]).toEqual([true, false]);
  expect([isOpen(batch({ status: 'expired' })), stateOf(batch({ status: 'cancelling' }))]).toEqual([false, 'closing']);
});

it('counts the rows that nobody answered', () => {
  expect(unanswered(batch({ request_counts: { total: 9, completed: 4, failed: 2 } }))).toBe(3);
});

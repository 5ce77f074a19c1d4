import type { Job, JobStatus } from '@/types/api';
import { expect, it } from 'vitest';
import { justEnded } from './ended';

const job = (id: string, status: JobStatus, created_at = 10): Job => ({ id, status, created_at }) as Job;
const ids = (jobs: Job[]) => jobs.map((each) => each.id);

it('tells nothing at the first look', () => {
  expect(justEnded(null, [job('a', 'succeeded')], 0)).toEqual([]);
});

it('tells each end once, however it ended', () => {
  const seen = new Map<string, JobStatus>([
    ['a', 'running'],
    ['b', 'queued'],
    ['c', 'paused'],
    ['d', 'failed'],
    ['e', 'running'],
  ]);
  const now = [
    job('a', 'succeeded'),
    job('b', 'cancelled'),
    job('c', 'failed'),
    job('d', 'failed'),
    job('e', 'running'),
  ];
  expect(ids(justEnded(seen, now, 0))).toEqual(['a', 'b', 'c']);
});

it('tells of one that began and ended between two looks, and of no old one', () => {
  expect(ids(justEnded(new Map(), [job('new', 'succeeded', 30), job('old', 'succeeded', 10)], 20))).toEqual(['new']);
});

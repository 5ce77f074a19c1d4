import type { BatchStatus, JobStatus } from '@/types/api';
import { expect, it } from 'vitest';
import { endOf, justEnded, seenAfter, type End, type Watched } from './ended';

const made = (id: string, end: End | null, created_at = 10): Watched => ({ id, end, created_at });
const ids = (found: Watched[]) => found.map((each) => each.id);

it('tells nothing at the first look', () => {
  expect(justEnded(null, [made('a', 'succeeded')])).toEqual([]);
});

it('tells each end once, however it ended', () => {
  const first = ['a', 'b', 'c', 'e'].map((id) => made(id, null));
  const seen = seenAfter(null, [...first, made('d', 'failed')]);
  const now = [
    made('a', 'succeeded'),
    made('b', 'cancelled'),
    made('c', 'expired'),
    made('d', 'failed'),
    made('e', null),
  ];
  expect(ids(justEnded(seen, now))).toEqual(['a', 'b', 'c']);
  expect(justEnded(seenAfter(seen, now), now)).toEqual([]);
});

it('tells of one that began and ended between two looks, in the same second too, and of no old one', () => {
  const seen = seenAfter(null, [made('known', null, 20)]);
  const now = [made('new', 'succeeded', 30), made('same second', 'completed', 20), made('old', 'succeeded', 10)];
  expect(ids(justEnded(seen, now))).toEqual(['new', 'same second']);
  expect(ids(justEnded(seenAfter(null, []), now))).toHaveLength(3);
});

it.each<[JobStatus | BatchStatus, boolean]>([
  ['queued', false],
  ['running', false],
  ['paused', false],
  ['succeeded', true],
  ['failed', true],
  ['cancelled', true],
  ['validating', false],
  ['in_progress', false],
  ['finalizing', false],
  ['cancelling', false],
  ['completed', true],
  ['expired', true],
])('knows whether %s is an end', (status, ends) => {
  expect(endOf(status)).toBe(ends ? status : null);
});

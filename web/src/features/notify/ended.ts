/** What has ended between two looks: trainings and batches. No React, no browser. */
import type { BatchStatus, JobStatus } from '@/types/api';

const ENDS = ['succeeded', 'completed', 'failed', 'expired', 'cancelled'] as const satisfies readonly (
  JobStatus | BatchStatus
)[];
export type End = (typeof ENDS)[number];

export interface Watched {
  id: string;
  created_at: number;
  end: End | null; // null: it goes on
}

export const endOf = (status: JobStatus | BatchStatus): End | null => ENDS.find((each) => each === status) ?? null;

/** What is known after a look; `newest`: when the newest was created, by the relay's clock. */
export interface Seen {
  ends: ReadonlyMap<string, End | null>;
  newest: number;
}

export const seenAfter = (before: Seen | null, now: readonly Watched[]): Seen => ({
  ends: new Map([...(before?.ends ?? []), ...now.map(({ id, end }) => [id, end] as const)]),
  newest: Math.max(before?.newest ?? 0, ...now.map((each) => each.created_at)),
});

/** `before`: null at the first look, when what has ended already is no news. */
export function justEnded<T extends Watched>(before: Seen | null, now: readonly T[]): T[] {
  if (before === null) return [];
  return now.filter((each) => {
    if (!each.end) return false;
    const end = before.ends.get(each.id);
    // One that was not there before was begun and ended in between, or stands on another page of the list.
    return end === undefined ? each.created_at >= before.newest : end === null;
  });
}

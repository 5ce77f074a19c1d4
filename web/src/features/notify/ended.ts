/** Which jobs have ended between two looks. No React, no browser. */
import type { Job, JobStatus } from '@/types/api';

export const ENDED = ['succeeded', 'failed', 'cancelled'] as const satisfies readonly JobStatus[];
export type Ended = (typeof ENDED)[number];

export const isEnded = (status: JobStatus): status is Ended => (ENDED as readonly JobStatus[]).includes(status);

/** `seen`: as the look before had it; null at the first, when what has ended already is no news. */
export function justEnded(seen: ReadonlyMap<string, JobStatus> | null, jobs: readonly Job[], since: number): Job[] {
  if (seen === null) return [];
  return jobs.filter((job) => {
    if (!isEnded(job.status)) return false;
    const before = seen.get(job.id);
    // One that was not there before was begun and ended in between, or stands on another page of the list.
    return before === undefined ? job.created_at >= since : !isEnded(before);
  });
}

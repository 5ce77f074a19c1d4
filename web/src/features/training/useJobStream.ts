/** A job's state and events as they come. A cut connection is made again and goes on after the last event. */
import { api, ApiError } from '@/lib/api';
import { readEvents } from '@/lib/sse';
import { job as jobShape, jobEvent, type Job, type JobEvent } from '@/types/api';
import { useQueryClient } from '@tanstack/react-query';
import { useEffect, useReducer } from 'react';
import { merge } from './progress';
import { jobQuery } from './queries';

const PAUSES_MS = [500, 1_000, 2_000, 5_000];

interface State {
  job: Job | null;
  events: JobEvent[];
  connected: boolean;
  error: ApiError | null;
}

type Change = { job: Job } | { events: JobEvent[] } | { connected: boolean } | { error: ApiError } | 'new';

const EMPTY: State = { job: null, events: [], connected: false, error: null };

function reduce(state: State, change: Change): State {
  if (change === 'new') return EMPTY;
  if ('events' in change) return { ...state, events: merge(state.events, change.events) };
  return { ...state, ...change };
}

export function useJobStream(id: string): State {
  const [state, dispatch] = useReducer(reduce, EMPTY);
  const queryClient = useQueryClient();
  useEffect(() => {
    const leaving = new AbortController();
    dispatch('new');
    void follow(id, leaving.signal, (change) => {
      dispatch(change);
      if (change !== 'new' && 'job' in change) {
        queryClient.setQueryData(jobQuery(id).queryKey, change.job);
        if (change.job.fine_tuned_model) void queryClient.invalidateQueries({ queryKey: ['models'] });
      }
    });
    return () => leaving.abort();
  }, [id, queryClient]);
  return state;
}

async function follow(id: string, signal: AbortSignal, tell: (change: Change) => void): Promise<void> {
  let lastEventId = '';
  let failures = 0;
  while (!signal.aborted) {
    try {
      const body = await api.stream(`/api/jobs/${id}/stream`, undefined, signal, lastEventId);
      tell({ connected: true });
      // Events that came together are told together: a long job's history is one change, not thousands.
      let waiting: JobEvent[] = [];
      let timer: ReturnType<typeof setTimeout> | null = null;
      const flush = () => {
        timer = null;
        if (waiting.length > 0 && !signal.aborted) tell({ events: waiting });
        waiting = [];
      };
      try {
        for await (const { id: eventId, event, data } of readEvents(body)) {
          failures = 0;
          if (eventId) lastEventId = eventId;
          if (data === '[DONE]') return;
          if (event === 'job') tell({ job: jobShape.parse(JSON.parse(data)) });
          else {
            waiting.push(jobEvent.parse(JSON.parse(data)));
            timer ??= setTimeout(flush, 50);
          }
        }
      } finally {
        if (timer) clearTimeout(timer);
        flush();
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500) {
        tell({ error });
        return;
      }
    }
    tell({ connected: false });
    const pause = PAUSES_MS[Math.min(failures++, PAUSES_MS.length - 1)];
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

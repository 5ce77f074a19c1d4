import { api, download } from '@/lib/api';
import { batch, batchFileReport, jobEvent, list, type Batch } from '@/types/api';
import { infiniteQueryOptions, queryOptions } from '@tanstack/react-query';
import { isOpen } from './state';

const A_PAGE = 20;
const EVENTS = 100; // the newest
const WATCHED_MS = 2_000; // gpus hand in every few seconds

export const batchesQuery = infiniteQueryOptions({
  queryKey: ['batches'],
  queryFn: ({ pageParam, signal }) =>
    api.get(`/v1/batches?limit=${A_PAGE}${pageParam ? `&after=${pageParam}` : ''}`, list(batch), signal),
  initialPageParam: '',
  getNextPageParam: (page) => (page.has_more ? page.data.at(-1)?.id : undefined),
  refetchInterval: 4_000,
});

export const batchQuery = (id: string) =>
  queryOptions({
    queryKey: ['batch', id],
    queryFn: ({ signal }) => api.get(`/v1/batches/${id}`, batch, signal),
    refetchInterval: ({ state }) => (state.data && !isOpen(state.data) ? false : WATCHED_MS),
  });

/** The oldest first. The last of them comes with the batch's end, so `over` is part of the question. */
export const batchEventsQuery = (id: string, over: boolean) =>
  queryOptions({
    queryKey: ['batch', id, 'events', over],
    queryFn: async ({ signal }) =>
      (await api.get(`/v1/batches/${id}/events?limit=${EVENTS}`, list(jobEvent), signal)).data.reverse(),
    refetchInterval: over ? false : WATCHED_MS,
    placeholderData: (before) => before,
  });

export const asksQuery = (fileId: string) =>
  queryOptions({
    queryKey: ['file-report', fileId],
    queryFn: ({ signal }) => api.get(`/v1/files/${fileId}/report`, batchFileReport, signal),
    retry: false,
    staleTime: Infinity, // a file does not change
  });

export interface NewBatch {
  input_file_id: string;
  endpoint: string;
  completion_window: string;
  metadata?: Record<string, string>;
}

export const createBatch = (asked: NewBatch): Promise<Batch> => api.post('/v1/batches', asked, batch);
const tell = (id: string, what: string): Promise<Batch> => api.post(`/v1/batches/${id}/${what}`, {}, batch);
export const cancelBatch = (id: string): Promise<Batch> => tell(id, 'cancel');
export const pauseBatch = (id: string): Promise<Batch> => tell(id, 'pause');
export const resumeBatch = (id: string): Promise<Batch> => tell(id, 'resume');

export const downloadFile = (id: string, name: string): Promise<void> => download(`/v1/files/${id}/content`, name);

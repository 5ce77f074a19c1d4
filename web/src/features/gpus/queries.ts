import { api } from '@/lib/api';
import { enrolToken, gpu, list } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

export const gpusQuery = queryOptions({
  queryKey: ['gpus'],
  queryFn: async ({ signal }) => (await api.get('/api/gpus', list(gpu), signal)).data,
  refetchInterval: 2_000,
});

/** For admins only. */
export const enrolTokenQuery = queryOptions({
  queryKey: ['enrol-token'],
  queryFn: ({ signal }) => api.get('/api/enrol-token', enrolToken, signal),
  staleTime: Infinity,
});

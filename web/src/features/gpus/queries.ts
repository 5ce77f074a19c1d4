import { api } from '@/lib/api';
import { enrolToken, gpu, list, madeToken, newToken } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';
import { z } from 'zod';

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

/** For admins only, as are all below. */
export const tokensQuery = queryOptions({
  queryKey: ['enrol-tokens'],
  queryFn: async ({ signal }) => (await api.get('/api/enrol-tokens', list(madeToken), signal)).data,
});

export const createToken = (asked: { name?: string; reusable: boolean; expires_in_s?: number }) =>
  api.post('/api/enrol-tokens', asked, newToken);
export const revokeToken = (id: string) => api.delete(`/api/enrol-tokens/${id}`);

export const drainGpu = (id: string) => api.post(`/api/gpus/${id}/drain`, {}, z.unknown());
export const undrainGpu = (id: string) => api.delete(`/api/gpus/${id}/drain`);

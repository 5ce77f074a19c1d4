import { api } from '@/lib/api';
import { apiKey, list, newKey } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

/** One's own keys; everybody's for the admin. */
export const keysQuery = queryOptions({
  queryKey: ['keys'],
  queryFn: async ({ signal }) => (await api.get('/api/keys', list(apiKey), signal)).data,
});

export const createKey = (asked: { name: string; user?: string }) => api.post('/api/keys', asked, newKey);
export const revokeKey = (id: string) => api.delete(`/api/keys/${id}`);

import { api } from '@/lib/api';
import { apiKey, list, newKey } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

export const SCOPES = ['generate', 'train', 'admin'] as const;
export type Scope = (typeof SCOPES)[number];

/** One's own keys; everybody's for the admin. */
export const keysQuery = queryOptions({
  queryKey: ['keys'],
  queryFn: async ({ signal }) => (await api.get('/api/keys', list(apiKey), signal)).data,
});

export interface NewKey {
  name: string;
  user?: string;
  scopes?: readonly Scope[];
  expires_in_s?: number;
  requests_per_minute?: number;
  tokens_per_month?: number;
  spend_per_month?: number;
}

export const createKey = (asked: NewKey) => api.post('/api/keys', asked, newKey);
export const revokeKey = (id: string) => api.delete(`/api/keys/${id}`);

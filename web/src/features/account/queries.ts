import { api } from '@/lib/api';
import { usage } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';
import { z } from 'zod';

/** Ends every session that was opened by password; `current` where there is one. */
export const changePassword = (asked: { password: string; current?: string }) =>
  api.put('/api/me/password', asked, z.unknown());

export const deleteAccount = (proof: { password: string } | { key: string }) => api.delete('/api/me', proof);

export const usageQuery = queryOptions({
  queryKey: ['usage'],
  queryFn: ({ signal }) => api.get('/api/usage', usage, signal),
});

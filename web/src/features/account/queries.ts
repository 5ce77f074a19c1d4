import { api } from '@/lib/api';
import { z } from 'zod';

/** Ends every session that was opened by password; `current` where there is one. */
export const changePassword = (asked: { password: string; current?: string }) =>
  api.put('/api/me/password', asked, z.unknown());

export const deleteAccount = (proof: { password: string } | { key: string }) => api.delete('/api/me', proof);

import { api, ApiError } from '@/lib/api';
import { me, type Me } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

/** Who is signed in; null: nobody. */
export const meQuery = queryOptions({
  queryKey: ['me'],
  queryFn: async ({ signal }): Promise<Me | null> => {
    try {
      return await api.get('/api/me', me, signal);
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) return null;
      throw error;
    }
  },
  staleTime: 60_000,
});

export type Proof = { key: string } | { name: string; password: string };
export const signIn = (proof: Proof): Promise<Me> => api.post('/api/session', proof, me);
export const signOut = (): Promise<void> => api.delete('/api/session');

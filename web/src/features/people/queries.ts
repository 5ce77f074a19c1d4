/** For the admin only: everybody else is refused. */
import { api } from '@/lib/api';
import { auditEntry, list, person } from '@/types/api';
import { infiniteQueryOptions, queryOptions } from '@tanstack/react-query';
import { z } from 'zod';

const done = z.unknown();

export const peopleQuery = queryOptions({
  queryKey: ['people'],
  queryFn: async ({ signal }) => (await api.get('/api/users', list(person), signal)).data,
  // A deletion ends by itself, some moments later.
  refetchInterval: (query) => (query.state.data?.some((each) => each.deleting_at !== null) ? 2_000 : false),
});

export const createPerson = (asked: { name: string; password?: string }) => api.post('/api/users', asked, done);
export const setPassword = (id: string, password: string) => api.put(`/api/users/${id}/password`, { password }, done);
export const disablePerson = (id: string) => api.post(`/api/users/${id}/disable`, {}, done);
export const enablePerson = (id: string) => api.delete(`/api/users/${id}/disable`);
export const deletePerson = (id: string) => api.delete(`/api/users/${id}`);

export interface AuditFilter {
  who: string | null;
  action: string | null;
}

const ENTRIES_A_PAGE = 50;

export const auditQuery = ({ who, action }: AuditFilter) =>
  infiniteQueryOptions({
    queryKey: ['audit', who, action],
    queryFn: ({ pageParam, signal }) => {
      const query = new URLSearchParams({ limit: String(ENTRIES_A_PAGE) });
      if (who) query.set('who', who);
      if (action) query.set('action', action);
      if (pageParam) query.set('after', String(pageParam));
      return api.get(`/api/audit?${query}`, list(auditEntry), signal);
    },
    initialPageParam: 0,
    getNextPageParam: (page) => (page.has_more ? page.data.at(-1)?.id : undefined),
  });

import { api } from '@/lib/api';
import { list, model } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

/** Base models first, then one's own tuned ones. Asked again while the page is open, for gpus come and go. */
export const modelsQuery = queryOptions({
  queryKey: ['models'],
  queryFn: async ({ signal }) => (await api.get('/v1/models', list(model), signal)).data,
  refetchInterval: 5_000,
});

import { api } from '@/lib/api';
import { delivery, list, newWebhook, webhook } from '@/types/api';
import { queryOptions } from '@tanstack/react-query';

const PATH = '/v1/webhook_endpoints';
export const EVENTS = ['succeeded', 'failed', 'cancelled', 'paused'] as const;
export type EventName = (typeof EVENTS)[number];

export const webhooksQuery = queryOptions({
  queryKey: ['webhooks'],
  queryFn: async ({ signal }) => (await api.get(`${PATH}?limit=100`, list(webhook), signal)).data,
});

export const deliveriesQuery = (id: string) =>
  queryOptions({
    queryKey: ['webhooks', id, 'deliveries'],
    queryFn: async ({ signal }) => (await api.get(`${PATH}/${id}/deliveries?limit=50`, list(delivery), signal)).data,
    refetchInterval: 5_000,
  });

export interface NewWebhook {
  url: string;
  name: string;
  events: readonly EventName[];
}

export const createWebhook = ({ url, name, events }: NewWebhook) =>
  api.post(PATH, { url, name, event_types: events.map((event) => `fine_tuning.job.${event}`) }, newWebhook);
export const deleteWebhook = (id: string) => api.delete(`${PATH}/${id}`);

/** `fine_tuning.job.failed` as the page names it; null: one that a later relay sends. */
export const eventName = (type: string): EventName | null =>
  EVENTS.find((event) => type === `fine_tuning.job.${event}`) ?? null;

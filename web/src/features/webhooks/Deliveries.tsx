import { ErrorNote } from '@/components/ErrorNote';
import { Row, Rows } from '@/components/Rows';
import { ago, until } from '@/lib/format';
import type { Delivery, Webhook } from '@/types/api';
import { Badge, Skeleton, Stack, Text } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { deliveriesQuery, eventName } from './queries';

const COLOURS = { waiting: 'gray', delivered: 'fern', given_up: 'red' } as const;

/** What came of each message: why nothing arrives is seen here first. */
export function Deliveries({ webhook }: { webhook: Webhook }) {
  const { t } = useTranslation();
  const deliveries = useQuery(deliveriesQuery(webhook.id));
  return (
    <Stack gap="sm">
      {deliveries.isError ? <ErrorNote error={deliveries.error} retry={() => void deliveries.refetch()} /> : null}
      {deliveries.isPending ? <Skeleton height={60} radius="md" /> : null}
      {deliveries.data?.length === 0 ? <Text size="sm">{t('webhooks.deliveriesNone')}</Text> : null}
      {deliveries.data && deliveries.data.length > 0 ? (
        <Rows label={t('webhooks.deliveries')}>
          {deliveries.data.map((each) => (
            <DeliveryRow key={each.id} delivery={each} />
          ))}
        </Rows>
      ) : null}
      <Text size="xs" c="dimmed">
        {t('webhooks.deliveriesKept')}
      </Text>
    </Stack>
  );
}

function DeliveryRow({ delivery }: { delivery: Delivery }) {
  const { t, i18n } = useTranslation();
  const event = eventName(delivery.event_type);
  return (
    <Row
      name={event ? t(`webhooks.event_${event}`) : delivery.event_type}
      marks={
        <Badge size="sm" variant="light" color={COLOURS[delivery.state]}>
          {t(`webhooks.state_${delivery.state}`)}
        </Badge>
      }
      facts={[
        ago(delivery.created_at, i18n.language),
        t('webhooks.attempts', { count: delivery.attempts }),
        delivery.last_status === null ? null : t('webhooks.status', { status: delivery.last_status }),
        delivery.last_error ? <span lang="en">{delivery.last_error}</span> : null,
        delivery.state === 'waiting' && delivery.next_at !== null
          ? t('webhooks.next', { when: until(delivery.next_at, i18n.language) })
          : null,
      ]}
    />
  );
}

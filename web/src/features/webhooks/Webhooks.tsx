import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Row, Rows } from '@/components/Rows';
import type { Webhook } from '@/types/api';
import { Button, Group, Stack, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Deliveries } from './Deliveries';
import { NewWebhook } from './NewWebhook';
import { deleteWebhook, eventName, webhooksQuery } from './queries';

/** On the account's screen: who is told when a job ends. */
export function Webhooks() {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const webhooks = useQuery(webhooksQuery);
  const [creating, modal] = useDisclosure(false);
  const [deleting, setDeleting] = useState<Webhook | null>(null);
  const [looking, setLooking] = useState<Webhook | null>(null);
  const nameOf = (each: Webhook) => each.name || new URL(each.url).host;
  return (
    <Stack gap="md" align="stretch">
      <Text size="sm" c="dimmed">
        {t('webhooks.text')}
      </Text>
      {webhooks.isError ? <ErrorNote error={webhooks.error} retry={() => void webhooks.refetch()} /> : null}
      {webhooks.data?.length === 0 ? <Text size="sm">{t('webhooks.none')}</Text> : null}
      {webhooks.data && webhooks.data.length > 0 ? (
        <Rows label={t('webhooks.title')}>
          {webhooks.data.map((each) => (
            <Row
              key={each.id}
              name={nameOf(each)}
              facts={[
                each.url,
                each.event_types
                  .map((type) => {
                    const event = eventName(type);
                    return event ? t(`webhooks.event_${event}`) : type;
                  })
                  .join(', '),
              ]}
            >
              <Group gap={4}>
                <Button variant="subtle" size="compact-sm" onClick={() => setLooking(each)}>
                  {t('webhooks.deliveries')}
                </Button>
                <Button
                  variant="subtle"
                  color="red"
                  size="compact-sm"
                  onClick={() => setDeleting(each)}
                  aria-label={t('webhooks.deleteNamed', { name: nameOf(each) })}
                >
                  {t('webhooks.delete')}
                </Button>
              </Group>
            </Row>
          ))}
        </Rows>
      ) : null}
      <Group>
        <Button variant="default" leftSection={<Icon name="plus" />} onClick={modal.open}>
          {t('webhooks.new')}
        </Button>
      </Group>
      <Dialog opened={creating} onClose={modal.close} title={t('webhooks.new')}>
        <NewWebhook onDone={modal.close} />
      </Dialog>
      <Dialog
        opened={looking !== null}
        onClose={() => setLooking(null)}
        title={looking ? t('webhooks.deliveriesOf', { name: nameOf(looking) }) : ''}
      >
        {looking ? <Deliveries webhook={looking} /> : null}
      </Dialog>
      <Dialog opened={deleting !== null} onClose={() => setDeleting(null)} title={t('webhooks.deleteTitle')}>
        {deleting ? (
          <Confirm
            yes={t('webhooks.deleteYes')}
            act={async () => {
              await deleteWebhook(deleting.id);
              await queryClient.invalidateQueries({ queryKey: webhooksQuery.queryKey });
            }}
            onDone={() => setDeleting(null)}
          >
            <Text size="sm">{t('webhooks.deleteText', { url: deleting.url })}</Text>
          </Confirm>
        ) : null}
      </Dialog>
    </Stack>
  );
}

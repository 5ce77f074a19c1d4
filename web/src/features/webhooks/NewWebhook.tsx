import { ErrorNote } from '@/components/ErrorNote';
import { Secret } from '@/components/Secret';
import { Button, Checkbox, Stack, TextInput } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { createWebhook, EVENTS, webhooksQuery, type EventName } from './queries';

const AT_FIRST: readonly EventName[] = ['succeeded', 'failed', 'cancelled'];

export function NewWebhook({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [url, setUrl] = useState('');
  const [name, setName] = useState('');
  const [events, setEvents] = useState(AT_FIRST);
  const making = useMutation({
    mutationFn: createWebhook,
    onSuccess: () => queryClient.invalidateQueries({ queryKey: webhooksQuery.queryKey }),
  });
  if (making.data) {
    return (
      <Secret
        title={t('webhooks.createdTitle')}
        text={t('webhooks.createdText')}
        secret={making.data.signing_secret}
        label={t('webhooks.secret')}
        done={t('webhooks.done')}
        onDone={onDone}
      />
    );
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        making.mutate({ url: url.trim(), name: name.trim(), events });
      }}
    >
      <Stack>
        <TextInput
          label={t('webhooks.url')}
          description={t('webhooks.urlText')}
          placeholder="https://example.com/hooks"
          type="url"
          value={url}
          onChange={(event) => setUrl(event.currentTarget.value)}
          maxLength={2_000}
          required
          withAsterisk={false}
          data-autofocus
        />
        <TextInput
          label={t('webhooks.name')}
          placeholder={t('webhooks.namePlaceholder')}
          value={name}
          onChange={(event) => setName(event.currentTarget.value)}
          maxLength={100}
        />
        <Checkbox.Group
          label={t('webhooks.events')}
          value={[...events]}
          onChange={(chosen) => setEvents(EVENTS.filter((event) => chosen.includes(event)))}
          error={events.length === 0 ? t('webhooks.eventsNone') : null}
        >
          <Stack gap={8} mt={6}>
            {EVENTS.map((event) => (
              <Checkbox key={event} value={event} label={t(`webhooks.event_${event}`)} />
            ))}
          </Stack>
        </Checkbox.Group>
        {making.error ? <ErrorNote error={making.error} /> : null}
        <Button type="submit" loading={making.isPending} disabled={!url.trim() || events.length === 0}>
          {t('webhooks.create')}
        </Button>
      </Stack>
    </form>
  );
}

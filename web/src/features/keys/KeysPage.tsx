import { CopyText } from '@/components/CopyText';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { meQuery } from '@/features/session/queries';
import { ago } from '@/lib/format';
import type { ApiKey } from '@/types/api';
import { Badge, Button, Group, Modal, Skeleton, Stack, Text, TextInput } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import css from './KeysPage.module.css';
import { createKey, keysQuery, revokeKey } from './queries';

export function KeysPage() {
  const { t } = useTranslation();
  const keys = useQuery(keysQuery);
  const [creating, modal] = useDisclosure(false);
  const [revoking, setRevoking] = useState<ApiKey | null>(null);
  return (
    <Page
      title={t('keys.title')}
      lead={t('keys.lead')}
      actions={
        <Button leftSection={<Icon name="plus" />} onClick={modal.open}>
          {t('keys.new')}
        </Button>
      }
    >
      <Stack gap="lg">
        {keys.isError ? <ErrorNote error={keys.error} retry={() => void keys.refetch()} /> : null}
        {keys.isPending ? <Skeleton height={90} radius="md" /> : null}
        {keys.data?.length === 0 ? <Text c="dimmed">{t('keys.none')}</Text> : null}
        {keys.data && keys.data.length > 0 ? (
          <ul className={css.list} aria-label={t('keys.title')}>
            {keys.data.map((key) => (
              <Row key={key.id} apiKey={key} onRevoke={() => setRevoking(key)} />
            ))}
          </ul>
        ) : null}
        <Card title={t('keys.use')}>
          <Text size="sm" c="dimmed">
            {t('keys.useText')}
          </Text>
          <CopyText text={`${location.origin}/v1`} label="base_url" />
          <CopyText text={`curl ${location.origin}/v1/models -H "Authorization: Bearer $KEY"`} label="curl" />
        </Card>
      </Stack>
      <Modal
        opened={creating}
        onClose={modal.close}
        title={t('keys.new')}
        centered
        closeButtonProps={{ 'aria-label': t('app.close') }}
      >
        <Create onDone={modal.close} />
      </Modal>
      <Modal
        opened={revoking !== null}
        onClose={() => setRevoking(null)}
        title={t('keys.revokeTitle')}
        centered
        closeButtonProps={{ 'aria-label': t('app.close') }}
      >
        {revoking ? <Revoke apiKey={revoking} onDone={() => setRevoking(null)} /> : null}
      </Modal>
    </Page>
  );
}

function Row({ apiKey, onRevoke }: { apiKey: ApiKey; onRevoke: () => void }) {
  const { t, i18n } = useTranslation();
  return (
    <li className={css.row}>
      <div className={css.words}>
        <div className={css.name}>
          {apiKey.name ?? (apiKey.fixed ? t('keys.fixed') : apiKey.user)}
          {apiKey.current ? (
            <Badge size="sm" variant="light">
              {t('keys.current')}
            </Badge>
          ) : null}
        </div>
        <div className={css.more}>
          <code>{apiKey.prefix}…</code> · {apiKey.user} · {t('keys.created')} {ago(apiKey.created_at, i18n.language)} ·{' '}
          {t('keys.used')} {apiKey.last_used_at ? ago(apiKey.last_used_at, i18n.language) : t('keys.never')}
        </div>
      </div>
      {apiKey.fixed ? null : (
        <Button
          variant="subtle"
          color="red"
          size="compact-sm"
          onClick={onRevoke}
          aria-label={t('keys.revokeNamed', { name: apiKey.name ?? apiKey.prefix })}
        >
          {t('keys.revoke')}
        </Button>
      )}
    </li>
  );
}

function Create({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const me = useQuery(meQuery);
  const [name, setName] = useState('');
  const [user, setUser] = useState('');
  const making = useMutation({
    mutationFn: createKey,
    onSuccess: () => queryClient.invalidateQueries({ queryKey: keysQuery.queryKey }),
  });
  if (making.data) {
    return (
      <Stack>
        <Text fw={600}>{t('keys.createdTitle')}</Text>
        <CopyText text={making.data.key} label={t('keys.prefix')} />
        <Text size="sm" c="dimmed">
          {t('keys.createdText', { user: user || me.data?.user.name })}
        </Text>
        <Button onClick={onDone}>{t('keys.done')}</Button>
      </Stack>
    );
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        making.mutate({ name: name.trim(), ...(user.trim() ? { user: user.trim() } : {}) });
      }}
    >
      <Stack>
        <TextInput
          label={t('keys.name')}
          placeholder={t('keys.namePlaceholder')}
          value={name}
          onChange={(event) => setName(event.currentTarget.value)}
          maxLength={100}
          data-autofocus
        />
        {me.data?.admin ? (
          <TextInput
            label={t('keys.user')}
            description={t('keys.userText')}
            placeholder={me.data.user.name}
            value={user}
            onChange={(event) => setUser(event.currentTarget.value)}
            maxLength={100}
          />
        ) : null}
        {making.error ? <ErrorNote error={making.error} /> : null}
        <Button type="submit" loading={making.isPending}>
          {t('keys.create')}
        </Button>
      </Stack>
    </form>
  );
}

function Revoke({ apiKey, onDone }: { apiKey: ApiKey; onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const revoking = useMutation({
    mutationFn: revokeKey,
    onSuccess: async () => {
      await queryClient.invalidateQueries();
      onDone();
    },
  });
  return (
    <>
      <Text size="sm">{t('keys.revokeText', { prefix: apiKey.prefix })}</Text>
      {revoking.error ? <ErrorNote error={revoking.error} /> : null}
      <Group justify="flex-end" mt="lg">
        <Button variant="default" onClick={onDone} data-autofocus>
          {t('app.cancel')}
        </Button>
        <Button
          color="red.8"

          loading={revoking.isPending}
          onClick={() => revoking.mutate(apiKey.id)}
        >
          {t('keys.revokeYes')}
        </Button>
      </Group>
    </>
  );
}

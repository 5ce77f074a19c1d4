import { Confirm } from '@/components/Confirm';
import { CopyText } from '@/components/CopyText';
import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Card, Page } from '@/components/Page';
import { Row, Rows } from '@/components/Rows';
import { ago, until } from '@/lib/format';
import type { ApiKey } from '@/types/api';
import { Badge, Button, Skeleton, Stack, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { NewKey } from './NewKey';
import { keysQuery, revokeKey, SCOPES } from './queries';

const OF_PASSWORD = 'password'; // stands where other keys have their first letters

export function KeysPage() {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
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
          <Rows label={t('keys.title')}>
            {keys.data.map((key) => (
              <KeyRow key={key.id} apiKey={key} onRevoke={() => setRevoking(key)} />
            ))}
          </Rows>
        ) : null}
        <Card title={t('keys.use')}>
          <Text size="sm" c="dimmed">
            {t('keys.useText')}
          </Text>
          <CopyText text={`${location.origin}/v1`} label="base_url" />
          <CopyText text={`curl ${location.origin}/v1/models -H "Authorization: Bearer $KEY"`} label="curl" />
        </Card>
      </Stack>
      <Dialog opened={creating} onClose={modal.close} title={t('keys.new')}>
        <NewKey onDone={modal.close} />
      </Dialog>
      <Dialog opened={revoking !== null} onClose={() => setRevoking(null)} title={t('keys.revokeTitle')}>
        {revoking ? (
          <Confirm
            yes={t('keys.revokeYes')}
            act={async () => {
              await revokeKey(revoking.id);
              await queryClient.invalidateQueries();
            }}
            onDone={() => setRevoking(null)}
          >
            <Text size="sm">{t('keys.revokeText', { prefix: revoking.prefix })}</Text>
          </Confirm>
        ) : null}
      </Dialog>
    </Page>
  );
}

function KeyRow({ apiKey, onRevoke }: { apiKey: ApiKey; onRevoke: () => void }) {
  const { t, i18n } = useTranslation();
  const { scopes, expires_at: ends, requests_per_minute: limit } = apiKey;
  const byPassword = apiKey.prefix === OF_PASSWORD;
  const name = apiKey.name ?? (apiKey.fixed ? t('keys.fixed') : byPassword ? t('keys.ofPassword') : apiKey.user);
  const may = SCOPES.filter((scope) => scopes.includes(scope)).map((scope) => t(`keys.scope_${scope}`));
  return (
    <Row
      name={name}
      marks={
        apiKey.current ? (
          <Badge size="sm" variant="light">
            {t('keys.current')}
          </Badge>
        ) : null
      }
      facts={[
        byPassword ? null : <code>{apiKey.prefix}…</code>,
        apiKey.user,
        `${t('keys.created')} ${ago(apiKey.created_at, i18n.language)}`,
        `${t('keys.used')} ${apiKey.last_used_at ? ago(apiKey.last_used_at, i18n.language) : t('keys.never')}`,
        may.length < SCOPES.length ? t('keys.only', { scopes: may.join(', ') }) : null,
        limit === null ? null : t('keys.limitOf', { count: limit }),
        apiKey.tokens_per_month
          ? t('usage.limitTokens', { amount: apiKey.tokens_per_month.toLocaleString(i18n.language) })
          : null,
        apiKey.spend_per_month
          ? t('usage.limitSpend', { amount: apiKey.spend_per_month.toLocaleString(i18n.language) })
          : null,
        ends === null ? null : t('keys.endsAt', { when: until(ends, i18n.language) }),
      ]}
    >
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
    </Row>
  );
}

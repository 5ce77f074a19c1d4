import { BackLink } from '@/components/BackLink';
import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { Empty } from '@/components/Empty';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { Page } from '@/components/Page';
import { Row, Rows } from '@/components/Rows';
import { ago, until } from '@/lib/format';
import type { MadeToken } from '@/types/api';
import { Badge, Button, Skeleton, Stack, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { NewToken } from './NewToken';
import { revokeToken, tokensQuery } from './queries';

/** What lets gpus in, beside the fixed token. The admin's. */
export function TokensPage() {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const tokens = useQuery(tokensQuery);
  const [creating, modal] = useDisclosure(false);
  const [revoking, setRevoking] = useState<MadeToken | null>(null);
  const good = tokens.data?.filter((token) => token.revoked_at === null) ?? [];
  const past = tokens.data?.filter((token) => token.revoked_at !== null) ?? [];
  return (
    <Page
      title={t('tokens.title')}
      lead={t('tokens.lead')}
      above={<BackLink to="/gpus">{t('tokens.back')}</BackLink>}
      actions={
        <Button leftSection={<Icon name="plus" />} onClick={modal.open}>
          {t('tokens.new')}
        </Button>
      }
    >
      <Stack gap="lg">
        {tokens.isError ? <ErrorNote error={tokens.error} retry={() => void tokens.refetch()} /> : null}
        {tokens.isPending ? <Skeleton height={90} radius="md" /> : null}
        {tokens.isSuccess && good.length === 0 ? <Empty title={t('tokens.none')} text={t('tokens.noneText')} /> : null}
        {good.length > 0 ? (
          <Rows label={t('tokens.title')}>
            {good.map((token) => (
              <TokenRow key={token.id} token={token} onRevoke={() => setRevoking(token)} />
            ))}
          </Rows>
        ) : null}
        {past.length > 0 ? (
          <Fold title={`${t('tokens.past')} (${past.length})`}>
            <Rows label={t('tokens.past')}>
              {past.map((token) => (
                <TokenRow key={token.id} token={token} />
              ))}
            </Rows>
          </Fold>
        ) : null}
      </Stack>
      <Dialog opened={creating} onClose={modal.close} title={t('tokens.new')}>
        <NewToken onDone={modal.close} />
      </Dialog>
      <Dialog opened={revoking !== null} onClose={() => setRevoking(null)} title={t('tokens.revokeTitle')}>
        {revoking ? (
          <Confirm
            yes={t('tokens.revokeYes')}
            act={async () => {
              await revokeToken(revoking.id);
              await queryClient.invalidateQueries({ queryKey: tokensQuery.queryKey });
              await queryClient.invalidateQueries({ queryKey: ['gpus'] });
            }}
            onDone={() => setRevoking(null)}
          >
            <Text size="sm">{t('tokens.revokeText', { prefix: revoking.prefix })}</Text>
            {revoking.gpus > 0 ? <Text size="sm">{t('tokens.revokeGpus', { count: revoking.gpus })}</Text> : null}
          </Confirm>
        ) : null}
      </Dialog>
    </Page>
  );
}

function TokenRow({ token, onRevoke }: { token: MadeToken; onRevoke?: () => void }) {
  const { t, i18n } = useTranslation();
  const { expires_at: ends, revoked_at: revoked, used_at: used } = token;
  const [now] = useState(() => Date.now() / 1000);
  const name = token.name ?? `${token.prefix}…`;
  const end = (at: number) =>
    at > now
      ? t('tokens.endsAt', { when: until(at, i18n.language) })
      : t('tokens.ended', { when: ago(at, i18n.language) });
  return (
    <Row
      name={name}
      marks={
        <Badge size="sm" variant="light">
          {t(token.reusable ? 'tokens.reusable' : 'tokens.oneTime')}
        </Badge>
      }
      facts={[
        token.name === null ? null : <code>{token.prefix}…</code>,
        used === null ? t('tokens.unused') : t('tokens.used', { when: ago(used, i18n.language) }),
        token.gpus > 0 ? t('tokens.gpus', { count: token.gpus }) : null,
        revoked !== null
          ? t('tokens.revoked', { when: ago(revoked, i18n.language) })
          : ends === null
            ? null
            : end(ends),
      ]}
    >
      {onRevoke ? (
        <Button
          variant="subtle"
          color="red"
          size="compact-sm"
          onClick={onRevoke}
          aria-label={t('tokens.revokeNamed', { name })}
        >
          {t('tokens.revoke')}
        </Button>
      ) : null}
    </Row>
  );
}

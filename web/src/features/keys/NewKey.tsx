import { Ends } from '@/components/Ends';
import { ErrorNote } from '@/components/ErrorNote';
import { Fold } from '@/components/Fold';
import { Secret } from '@/components/Secret';
import { meQuery } from '@/features/session/queries';
import { Button, Checkbox, NumberInput, Stack, TextInput } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { createKey, keysQuery, SCOPES, type Scope } from './queries';

export function NewKey({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const me = useQuery(meQuery);
  const [name, setName] = useState('');
  const [user, setUser] = useState('');
  const [scopes, setScopes] = useState<readonly Scope[]>(SCOPES);
  const [ends, setEnds] = useState<number | null>(null);
  const [limit, setLimit] = useState<number | null>(null);
  const [tokens, setTokens] = useState<number | null>(null);
  const [spend, setSpend] = useState<number | null>(null);
  const limited = scopes.length < SCOPES.length || [ends, limit, tokens, spend].some((each) => each !== null);
  const making = useMutation({
    mutationFn: createKey,
    onSuccess: () => queryClient.invalidateQueries({ queryKey: keysQuery.queryKey }),
  });
  if (making.data) {
    return (
      <Secret
        title={t('keys.createdTitle')}
        text={t('keys.createdText', { user: user.trim() || me.data?.user.name })}
        secret={making.data.key}
        label={t('keys.prefix')}
        done={t('keys.done')}
        onDone={onDone}
      />
    );
  }
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        making.mutate({
          name: name.trim(),
          ...(user.trim() ? { user: user.trim() } : {}),
          ...(scopes.length < SCOPES.length ? { scopes } : {}),
          ...(ends === null ? {} : { expires_in_s: ends }),
          ...(limit === null ? {} : { requests_per_minute: limit }),
          ...(tokens === null ? {} : { tokens_per_month: tokens }),
          ...(spend === null ? {} : { spend_per_month: spend }),
        });
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
        <Fold title={t('keys.limits')} mark={limited}>
          <Stack>
            <Checkbox.Group
              label={t('keys.may')}
              value={[...scopes]}
              onChange={(chosen) => setScopes(SCOPES.filter((scope) => chosen.includes(scope)))}
              error={scopes.length === 0 ? t('keys.scopeNone') : null}
            >
              <Stack gap={8} mt={6}>
                {SCOPES.map((scope) => (
                  <Checkbox
                    key={scope}
                    value={scope}
                    label={t(`keys.scope_${scope}`)}
                    description={t(`keys.scope_${scope}_text`)}
                  />
                ))}
              </Stack>
            </Checkbox.Group>
            <Ends label={t('keys.ends')} value={ends} onChange={setEnds} />
            <NumberInput
              label={t('keys.limit')}
              description={t('keys.limitText')}
              value={limit ?? ''}
              onChange={(value) => setLimit(typeof value === 'number' ? value : null)}
              min={1}
              max={1_000_000}
              allowDecimal={false}
            />
            <NumberInput
              label={t('usage.perMonth')}
              description={t('usage.perMonthText')}
              value={tokens ?? ''}
              onChange={(value) => setTokens(typeof value === 'number' ? value : null)}
              min={1}
              max={1e15}
              allowDecimal={false}
              thousandSeparator
            />
            <NumberInput
              label={t('usage.spendPerMonth')}
              description={t('usage.spendPerMonthText')}
              value={spend ?? ''}
              onChange={(value) => setSpend(typeof value === 'number' ? value : null)}
              min={0.000_001}
              max={1e12}
              hideControls
            />
          </Stack>
        </Fold>
        {making.error ? <ErrorNote error={making.error} /> : null}
        <Button type="submit" loading={making.isPending} disabled={scopes.length === 0}>
          {t('keys.create')}
        </Button>
      </Stack>
    </form>
  );
}

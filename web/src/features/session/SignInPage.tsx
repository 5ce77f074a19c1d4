import { Brand } from '@/components/Brand';
import { CopyText } from '@/components/CopyText';
import { ErrorNote } from '@/components/ErrorNote';
import { useTitle } from '@/components/Page';
import { ApiError } from '@/lib/api';
import { LANGUAGES, setLanguage, type Language } from '@/lib/i18n';
import { Button, PasswordInput, SegmentedControl, Stack, Text, TextInput, Title } from '@mantine/core';
import { useLocalStorage } from '@mantine/hooks';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Navigate, useLocation } from 'react-router';
import { meQuery, signIn } from './queries';
import css from './SignInPage.module.css';

type Way = 'key' | 'password';

/** By key, or by name and password; the way that was taken last is offered first. */
export function SignInPage() {
  const { t, i18n } = useTranslation();
  useTitle(t('session.title'));
  const me = useQuery(meQuery);
  const [way, setWay] = useLocalStorage<Way>({
    key: 'fine-sign-in',
    defaultValue: 'key',
    getInitialValueInEffect: false,
  });
  const from = (useLocation().state as { from?: string } | null)?.from ?? '/';
  if (me.data) return <Navigate to={from} replace />;
  return (
    <main className={css.page}>
      <div className={css.card}>
        <div className={css.top}>
          <Brand />
          <SegmentedControl
            size="xs"
            value={i18n.language}
            onChange={(code) => void setLanguage(code as Language)}
            data={Object.entries(LANGUAGES).map(([value, label]) => ({ value, label }))}
            aria-label={t('app.language')}
          />
        </div>
        <div>
          <Title order={1}>{t('session.title')}</Title>
          <Text c="dimmed" mt={4}>
            {t('session.lead')}
          </Text>
        </div>
        <SegmentedControl
          fullWidth
          aria-label={t('session.how')}
          value={way}
          onChange={setWay}
          data={[
            { value: 'key', label: t('session.key') },
            { value: 'password', label: t('session.byPassword') },
          ]}
        />
        <Enter key={way} way={way} />
        {way === 'key' ? (
          <details className={css.where}>
            <summary>{t('session.where')}</summary>
            <Stack gap="xs" mt="xs">
              <Text size="sm">{t('session.whereAdmin')}</Text>
              <CopyText text="cat data/relay/admin.key" label="admin.key" />
              <Text size="sm">{t('session.whereOther')}</Text>
              <CopyText text="python -m relay keys create --user NAME" label="relay keys create" />
            </Stack>
          </details>
        ) : (
          <Text size="sm" c="dimmed">
            {t('session.noPassword')}
          </Text>
        )}
      </div>
    </main>
  );
}

function Enter({ way }: { way: Way }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [name, setName] = useState('');
  const [secret, setSecret] = useState('');
  const entering = useMutation({
    mutationFn: signIn,
    onSuccess: async (who) => {
      queryClient.setQueryData(meQuery.queryKey, who);
      await queryClient.invalidateQueries({ queryKey: meQuery.queryKey }); // which tells more
    },
  });
  const refused = way === 'password' && entering.error instanceof ApiError && entering.error.status === 401;
  const byKey = way === 'key';
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        if (byKey && secret.trim()) entering.mutate({ key: secret.trim() });
        if (!byKey && name.trim() && secret) entering.mutate({ name: name.trim(), password: secret });
      }}
    >
      <Stack>
        {byKey ? null : (
          <TextInput
            label={t('session.name')}
            value={name}
            onChange={(event) => setName(event.currentTarget.value)}
            autoComplete="username"
            autoCapitalize="none"
            size="md"
            spellCheck={false}
            autoFocus
            required
            withAsterisk={false}
          />
        )}
        <PasswordInput
          label={t(byKey ? 'session.key' : 'session.password')}
          description={byKey ? t('session.safe') : null}
          inputWrapperOrder={['label', 'input', 'description']}
          placeholder={byKey ? t('session.placeholder') : ''}
          value={secret}
          onChange={(event) => setSecret(event.currentTarget.value)}
          autoComplete="current-password"
          visibilityToggleButtonProps={{
            'aria-label': t(byKey ? 'session.show' : 'session.showPassword'),
            tabIndex: 0,
          }}
          size="md"
          spellCheck={false}
          autoFocus={byKey}
          required
          withAsterisk={false}
        />
        {entering.error ? (
          <ErrorNote error={refused ? new ApiError(entering.error.message, 401, 'wrong_password') : entering.error} />
        ) : null}
        <Button type="submit" size="md" loading={entering.isPending}>
          {t('session.submit')}
        </Button>
      </Stack>
    </form>
  );
}

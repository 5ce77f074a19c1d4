import { Brand } from '@/components/Brand';
import { CopyText } from '@/components/CopyText';
import { ErrorNote } from '@/components/ErrorNote';
import { useTitle } from '@/components/Page';
import { LANGUAGES, setLanguage, type Language } from '@/lib/i18n';
import { Button, PasswordInput, SegmentedControl, Stack, Text, Title } from '@mantine/core';
import { useMutation, useQuery, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { Navigate, useLocation } from 'react-router';
import { meQuery, signIn } from './queries';
import css from './SignInPage.module.css';

export function SignInPage() {
  const { t, i18n } = useTranslation();
  useTitle(t('session.title'));
  const queryClient = useQueryClient();
  const me = useQuery(meQuery);
  const [key, setKey] = useState('');
  const from = (useLocation().state as { from?: string } | null)?.from ?? '/';
  const entering = useMutation({
    mutationFn: signIn,
    onSuccess: (who) => queryClient.setQueryData(meQuery.queryKey, who),
  });
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
        <form
          onSubmit={(event) => {
            event.preventDefault();
            if (key.trim()) entering.mutate(key.trim());
          }}
        >
          <Stack>
            <PasswordInput
              label={t('session.key')}
              description={t('session.safe')}
              inputWrapperOrder={['label', 'input', 'description']}
              placeholder={t('session.placeholder')}
              value={key}
              onChange={(event) => setKey(event.currentTarget.value)}
              autoComplete="current-password"
              visibilityToggleButtonProps={{ 'aria-label': t('session.show'), tabIndex: 0 }}
              size="md"
              spellCheck={false}
              autoFocus
              required
              withAsterisk={false}
            />
            {entering.error ? <ErrorNote error={entering.error} /> : null}
            <Button type="submit" size="md" loading={entering.isPending}>
              {t('session.submit')}
            </Button>
          </Stack>
        </form>
        <details className={css.where}>
          <summary>{t('session.where')}</summary>
          <Stack gap="xs" mt="xs">
            <Text size="sm">{t('session.whereAdmin')}</Text>
            <CopyText text="cat data/relay/admin.key" label="admin.key" />
            <Text size="sm">{t('session.whereOther')}</Text>
            <CopyText text="python -m relay keys create --user NAME" label="relay keys create" />
          </Stack>
        </details>
      </div>
    </main>
  );
}

import { ErrorNote } from '@/components/ErrorNote';
import { meQuery } from '@/features/session/queries';
import { ApiError } from '@/lib/api';
import type { Me } from '@/types/api';
import { Alert, Button, PasswordInput, Stack, Text } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { PASSWORD_CHARS } from './password';
import { changePassword } from './queries';

export function Password({ me }: { me: Me }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [current, setCurrent] = useState('');
  const [fresh, setFresh] = useState('');
  const has = me.has_password === true;
  const changing = useMutation({
    mutationFn: changePassword,
    onSuccess: async () => {
      setCurrent('');
      setFresh('');
      await queryClient.invalidateQueries({ queryKey: meQuery.queryKey }); // who came by password is signed out
    },
  });
  const wrong = changing.error instanceof ApiError && changing.error.param === 'current';
  const short = fresh.length < PASSWORD_CHARS;
  const eye = { 'aria-label': t('session.showPassword'), tabIndex: 0 };
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        changing.mutate({ password: fresh, ...(has ? { current } : {}) });
      }}
    >
      <Stack align="stretch" maw={420}>
        <Text size="sm" c="dimmed">
          {t(has ? 'account.passwordHave' : 'account.passwordNone', { name: me.user.name })}
        </Text>
        <input type="text" name="username" autoComplete="username" value={me.user.name} readOnly hidden />
        {has ? (
          <PasswordInput
            label={t('account.current')}
            value={current}
            onChange={(event) => setCurrent(event.currentTarget.value)}
            error={wrong ? t('account.wrong') : null}
            autoComplete="current-password"
            visibilityToggleButtonProps={eye}
          />
        ) : null}
        <PasswordInput
          label={t('account.new')}
          description={t('account.newText')}
          value={fresh}
          onChange={(event) => setFresh(event.currentTarget.value)}
          error={short && fresh ? t('account.tooShort') : null}
          autoComplete="new-password"
          visibilityToggleButtonProps={eye}
        />
        {changing.error && !wrong ? <ErrorNote error={changing.error} /> : null}
        {changing.isSuccess ? (
          <Alert color="fern" variant="light" role="status">
            {t('account.changed')}
          </Alert>
        ) : null}
        <Button type="submit" variant="default" loading={changing.isPending} disabled={short || (has && !current)}>
          {t(has ? 'account.change' : 'account.set')}
        </Button>
      </Stack>
    </form>
  );
}

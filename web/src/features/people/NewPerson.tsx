import { ErrorNote } from '@/components/ErrorNote';
import { PASSWORD_CHARS } from '@/features/account/password';
import { Button, PasswordInput, Stack, TextInput } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { createPerson, peopleQuery } from './queries';

export function NewPerson({ onDone }: { onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [name, setName] = useState('');
  const [password, setPassword] = useState('');
  const creating = useMutation({
    mutationFn: createPerson,
    onSuccess: async () => {
      await queryClient.invalidateQueries({ queryKey: peopleQuery.queryKey });
      onDone();
    },
  });
  const short = password.length > 0 && password.length < PASSWORD_CHARS;
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        creating.mutate({ name: name.trim(), ...(password ? { password } : {}) });
      }}
    >
      <Stack>
        <TextInput
          label={t('people.name')}
          description={t('people.nameText')}
          value={name}
          onChange={(event) => setName(event.currentTarget.value)}
          maxLength={100}
          autoComplete="off"
          spellCheck={false}
          required
          withAsterisk={false}
          data-autofocus
        />
        <PasswordInput
          label={`${t('people.password')} (${t('app.optional')})`}
          description={`${t('people.passwordText')} ${t('people.passwordLater')}`}
          value={password}
          onChange={(event) => setPassword(event.currentTarget.value)}
          error={short ? t('account.tooShort') : null}
          autoComplete="new-password"
          visibilityToggleButtonProps={{ 'aria-label': t('session.showPassword'), tabIndex: 0 }}
        />
        {creating.error ? <ErrorNote error={creating.error} /> : null}
        <Button type="submit" loading={creating.isPending} disabled={!name.trim() || short}>
          {t('people.create')}
        </Button>
      </Stack>
    </form>
  );
}

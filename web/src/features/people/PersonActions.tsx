import { Confirm } from '@/components/Confirm';
import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { PASSWORD_CHARS } from '@/features/account/password';
import type { Person } from '@/types/api';
import { ActionIcon, Button, List, Menu, PasswordInput, Stack, Text } from '@mantine/core';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { deletePerson, disablePerson, enablePerson, peopleQuery, setPassword } from './queries';

/** What the admin can do with somebody else's account. */
export function PersonActions({ person }: { person: Person }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const [asking, setAsking] = useState<'password' | 'disable' | 'delete' | null>(null);
  const { id, name } = person;
  const out = person.disabled_at !== null;
  const close = () => setAsking(null);
  const afterwards = async (done: Promise<unknown>) => {
    await done;
    await queryClient.invalidateQueries({ queryKey: peopleQuery.queryKey });
  };
  const enabling = useMutation({ mutationFn: () => afterwards(enablePerson(id)) });
  return (
    <>
      <Menu position="bottom-end" shadow="md">
        <Menu.Target>
          <ActionIcon variant="subtle" color="gray" size="lg" aria-label={t('people.actions', { name })}>
            <Icon name="more" />
          </ActionIcon>
        </Menu.Target>
        <Menu.Dropdown>
          <Menu.Item onClick={() => setAsking('password')}>{t('people.setPassword')}</Menu.Item>
          <Menu.Item onClick={() => (out ? enabling.mutate() : setAsking('disable'))}>
            {t(out ? 'people.enable' : 'people.disable')}
          </Menu.Item>
          <Menu.Item color="red" onClick={() => setAsking('delete')}>
            {t('people.delete')}
          </Menu.Item>
        </Menu.Dropdown>
      </Menu>
      <Dialog opened={enabling.isError} onClose={enabling.reset} title={t('people.enable')}>
        <ErrorNote error={enabling.error} retry={() => enabling.mutate()} />
      </Dialog>
      <Dialog opened={asking === 'password'} onClose={close} title={t('people.setPasswordOf', { name })}>
        <SetPassword save={(password) => afterwards(setPassword(id, password))} onDone={close} />
      </Dialog>
      <Dialog opened={asking === 'disable'} onClose={close} title={t('people.disableTitle', { name })}>
        <Confirm yes={t('people.disable')} act={() => afterwards(disablePerson(id))} onDone={close}>
          <Text size="sm">{t('people.disableText')}</Text>
        </Confirm>
      </Dialog>
      <Dialog opened={asking === 'delete'} onClose={close} title={t('people.deleteTitle', { name })}>
        <Confirm yes={t('people.deleteYes', { name })} act={() => afterwards(deletePerson(id))} onDone={close}>
          <Text size="sm">{t('people.deleteText')}</Text>
          <WhatGoes />
        </Confirm>
      </Dialog>
    </>
  );
}

/** Of an account that is deleted, one's own or another's. */
export function WhatGoes() {
  const { t } = useTranslation();
  return (
    <>
      <List size="sm">
        <List.Item>{t('people.deleteJobs')}</List.Item>
        <List.Item>{t('people.deleteFiles')}</List.Item>
        <List.Item>{t('people.deleteModels')}</List.Item>
        <List.Item>{t('people.deleteKeys')}</List.Item>
      </List>
      <Text size="sm" c="dimmed">
        {t('people.deleteKept')}
      </Text>
    </>
  );
}

function SetPassword({ save, onDone }: { save: (password: string) => Promise<void>; onDone: () => void }) {
  const { t } = useTranslation();
  const [password, setPassword] = useState('');
  const saving = useMutation({ mutationFn: save, onSuccess: onDone });
  const short = password.length < PASSWORD_CHARS;
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        saving.mutate(password);
      }}
    >
      <Stack>
        <PasswordInput
          label={t('people.password')}
          description={`${t('people.passwordText')} ${t('people.setPasswordText')}`}
          value={password}
          onChange={(event) => setPassword(event.currentTarget.value)}
          error={short && password ? t('account.tooShort') : null}
          autoComplete="new-password"
          visibilityToggleButtonProps={{ 'aria-label': t('session.showPassword'), tabIndex: 0 }}
          data-autofocus
        />
        {saving.error ? <ErrorNote error={saving.error} /> : null}
        <Button type="submit" loading={saving.isPending} disabled={short}>
          {t('people.save')}
        </Button>
      </Stack>
    </form>
  );
}

import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { forgetUser } from '@/features/generate/conversation';
import { WhatGoes } from '@/features/people/PersonActions';
import { ApiError } from '@/lib/api';
import type { Me } from '@/types/api';
import { Button, Group, PasswordInput, SegmentedControl, Stack, Text } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useMutation, useQueryClient } from '@tanstack/react-query';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import { useNavigate } from 'react-router';
import { deleteAccount } from './queries';

export function DeleteAccount({ me }: { me: Me }) {
  const { t } = useTranslation();
  const [asking, modal] = useDisclosure(false);
  if (me.admin) return <Text size="sm">{t('account.deleteAdmin')}</Text>;
  return (
    <>
      <Text size="sm">{t('account.deleteText')}</Text>
      <Group>
        <Button variant="light" color="red" onClick={modal.open}>
          {t('account.deleteOpen')}
        </Button>
      </Group>
      <Dialog opened={asking} onClose={modal.close} title={t('account.deleteTitle')}>
        <Ask me={me} onDone={modal.close} />
      </Dialog>
    </>
  );
}

function Ask({ me, onDone }: { me: Me; onDone: () => void }) {
  const { t } = useTranslation();
  const queryClient = useQueryClient();
  const navigate = useNavigate();
  const [by, setBy] = useState<'password' | 'key'>(me.has_password ? 'password' : 'key');
  const [secret, setSecret] = useState('');
  const deleting = useMutation({
    mutationFn: () => deleteAccount(by === 'key' ? { key: secret.trim() } : { password: secret }),
    onSuccess: async () => {
      forgetUser();
      queryClient.clear();
      await navigate('/sign-in');
    },
  });
  const refused = deleting.error instanceof ApiError && deleting.error.code === 'forbidden';
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        deleting.mutate();
      }}
    >
      <Stack>
        <Text size="sm">{t('people.deleteText')}</Text>
        <WhatGoes />
        <Text size="sm" fw={600}>
          {t('account.deleteAsk')}
        </Text>
        {me.has_password ? (
          <SegmentedControl
            aria-label={t('account.deleteBy')}
            value={by}
            onChange={setBy}
            data={[
              { value: 'password', label: t('account.byPassword') },
              { value: 'key', label: t('account.byKey') },
            ]}
          />
        ) : null}
        <PasswordInput
          label={t(by === 'key' ? 'account.byKey' : 'account.byPassword')}
          value={secret}
          onChange={(event) => setSecret(event.currentTarget.value)}
          error={refused ? t('account.notYou') : null}
          autoComplete={by === 'key' ? 'off' : 'current-password'}
          visibilityToggleButtonProps={{
            'aria-label': t(by === 'key' ? 'session.show' : 'session.showPassword'),
            tabIndex: 0,
          }}
        />
        {deleting.error && !refused ? <ErrorNote error={deleting.error} /> : null}
        <Group justify="flex-end">
          <Button variant="default" onClick={onDone} data-autofocus>
            {t('app.cancel')}
          </Button>
          <Button type="submit" color="red.8" loading={deleting.isPending} disabled={!secret}>
            {t('account.deleteYes')}
          </Button>
        </Group>
      </Stack>
    </form>
  );
}

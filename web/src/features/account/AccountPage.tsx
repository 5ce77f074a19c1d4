import { Card, Page } from '@/components/Page';
import { NotifySwitch } from '@/features/notify/NotifySwitch';
import { meQuery } from '@/features/session/queries';
import { Webhooks } from '@/features/webhooks/Webhooks';
import { Stack } from '@mantine/core';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { DeleteAccount } from './DeleteAccount';
import { Password } from './Password';
import { Storage } from './Storage';
import { Usage } from './Usage';

/** One's own account: how to get in, and how to get out. */
export function AccountPage() {
  const { t } = useTranslation();
  const me = useQuery({ ...meQuery, refetchOnMount: 'always' }).data;
  if (!me) return null; // the shell shows this screen to those who are signed in
  return (
    <Page title={t('account.title')} lead={t('account.lead', { name: me.user.name })}>
      <Stack gap="lg">
        <Card title={t('account.password')}>
          <Password me={me} />
        </Card>
        {me.storage ? (
          <Card title={t('account.storage')}>
            <Storage storage={me.storage} />
          </Card>
        ) : null}
        <Card title={t('usage.title')}>
          <Usage />
        </Card>
        <Card title={t('notify.title')}>
          <NotifySwitch />
        </Card>
        <Card title={t('webhooks.title')}>
          <Webhooks />
        </Card>
        <Card title={t('account.delete')}>
          <DeleteAccount me={me} />
        </Card>
      </Stack>
    </Page>
  );
}

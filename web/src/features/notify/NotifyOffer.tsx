import { Icon } from '@/components/Icon';
import { Button, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { turnOn, useNotify } from './setting';

/** Beside a job that goes on: nobody needs to sit and watch it. */
export function NotifyOffer() {
  const { t } = useTranslation();
  const state = useNotify();
  if (state === 'unsupported') return null;
  if (state !== 'off') {
    return (
      <Text size="sm" c="dimmed" role="status">
        {t(state === 'on' ? 'notify.willTell' : 'notify.denied')}
      </Text>
    );
  }
  return (
    <Button
      variant="subtle"
      size="compact-sm"
      leftSection={<Icon name="bell" size={16} />}
      onClick={() => void turnOn()}
      style={{ alignSelf: 'flex-start' }}
    >
      {t('notify.offer')}
    </Button>
  );
}

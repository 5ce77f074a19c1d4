import { Stack, Switch, Text } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { turnOff, turnOn, useNotify } from './setting';

/** On the account's screen. */
export function NotifySwitch() {
  const { t } = useTranslation();
  const state = useNotify();
  return (
    <Stack gap="sm">
      <Text size="sm" c="dimmed">
        {t('notify.text')}
      </Text>
      <Switch
        label={t('notify.on')}
        checked={state === 'on'}
        disabled={state === 'unsupported'}
        onChange={(event) => (event.currentTarget.checked ? void turnOn() : turnOff())}
      />
      {state === 'denied' || state === 'unsupported' ? (
        <Text size="sm" role="status">
          {t(`notify.${state}`)}
        </Text>
      ) : null}
    </Stack>
  );
}

import { Fold } from '@/components/Fold';
import { NumberInput, Stack, Textarea } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import type { Sampling } from './conversation';
import { setSettings, type Settings } from './settings';

/** Folded away: good answers need none of it. */
export function SamplingForm({ settings, chat }: { settings: Settings; chat: boolean }) {
  const { t } = useTranslation();
  const { sampling } = settings;
  const set = (field: keyof Sampling) => (value: number | string) => {
    if (typeof value === 'number') setSettings({ sampling: { ...sampling, [field]: value } });
  };
  return (
    <Stack gap="xs">
      {chat ? (
        <Fold title={t('generate.system')} mark={settings.system.trim() !== ''}>
          <Textarea
            aria-label={t('generate.system')}
            description={t('generate.systemText')}
            placeholder={t('generate.systemPlaceholder')}
            value={settings.system}
            onChange={(event) => setSettings({ system: event.currentTarget.value })}
            autosize
            minRows={3}
            maxRows={10}
          />
        </Fold>
      ) : null}
      <Fold title={t('generate.sampling')}>
        <Stack gap="sm">
          <NumberInput
            label={t('generate.temperature')}
            description={t('generate.temperatureText')}
            value={sampling.temperature}
            onChange={set('temperature')}
            min={0}
            max={2}
            step={0.1}
            decimalScale={2}
          />
          <NumberInput
            label={t('generate.topP')}
            description={t('generate.topPText')}
            value={sampling.topP}
            onChange={set('topP')}
            min={0.05}
            max={1}
            step={0.05}
            decimalScale={2}
          />
          <NumberInput
            label={t('generate.maxTokens')}
            description={t('generate.maxTokensText')}
            value={sampling.maxTokens}
            onChange={set('maxTokens')}
            min={1}
            max={32_768}
            step={50}
            allowDecimal={false}
          />
        </Stack>
      </Fold>
    </Stack>
  );
}

import { Fold } from '@/components/Fold';
import { NumberInput, Stack, Switch, TagsInput, Textarea } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { hasMore, type Sampling } from './sampling';
import { setSettings, type Settings } from './settings';

/** Folded away: good answers need none of it. */
export function SamplingForm({ settings, chat }: { settings: Settings; chat: boolean }) {
  const { t } = useTranslation();
  const { sampling } = settings;
  const change = (fields: Partial<Sampling>) => setSettings({ sampling: { ...sampling, ...fields } });
  const set = (field: keyof Sampling) => (value: number | string) => {
    if (typeof value === 'number') change({ [field]: value });
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
      <Fold title={t('sampling.more')} mark={hasMore(sampling)}>
        <Stack gap="sm">
          <NumberInput
            label={t('sampling.seed')}
            description={t('sampling.seedText')}
            placeholder={t('sampling.seedAny')}
            value={sampling.seed ?? ''}
            onChange={(value) => change({ seed: typeof value === 'number' ? value : null })}
            min={0}
            max={2 ** 53 - 1}
            allowDecimal={false}
            hideControls
          />
          <TagsInput
            label={t('sampling.stop')}
            description={t('sampling.stopText')}
            value={[...sampling.stop]}
            onChange={(stop) => change({ stop })}
            maxTags={4}
          />
          <NumberInput
            label={t('sampling.topK')}
            description={t('sampling.topKText')}
            value={sampling.topK}
            onChange={set('topK')}
            min={0}
            max={1000}
            allowDecimal={false}
          />
          <NumberInput
            label={t('sampling.minP')}
            description={t('sampling.minPText')}
            value={sampling.minP}
            onChange={set('minP')}
            min={0}
            max={1}
            step={0.05}
            decimalScale={2}
          />
          <NumberInput
            label={t('sampling.repetition')}
            description={t('sampling.repetitionText')}
            value={sampling.repetition}
            onChange={set('repetition')}
            min={0.1}
            max={10}
            step={0.05}
            decimalScale={2}
          />
          <NumberInput
            label={t('sampling.presence')}
            description={t('sampling.presenceText')}
            value={sampling.presence}
            onChange={set('presence')}
            min={-2}
            max={2}
            step={0.1}
            decimalScale={2}
          />
          <NumberInput
            label={t('sampling.frequency')}
            description={t('sampling.frequencyText')}
            value={sampling.frequency}
            onChange={set('frequency')}
            min={-2}
            max={2}
            step={0.1}
            decimalScale={2}
          />
          <Switch
            label={t('sampling.deterministic')}
            description={t('sampling.deterministicText')}
            checked={sampling.deterministic}
            onChange={(event) => change({ deterministic: event.currentTarget.checked })}
          />
        </Stack>
      </Fold>
    </Stack>
  );
}

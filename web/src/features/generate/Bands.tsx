import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import { ActionIcon, Button, NumberInput, Stack, Text, TextInput } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './Bands.module.css';
import { DIALS, MOST_BANDS, NEUTRAL, turnedBands, type Band } from './dials';

interface Props {
  bands: readonly Band[];
  blocks: boolean; // of a UNet, rather than numbered layers
  onChange: (bands: readonly Band[]) => void;
}

/** The dials on some layers only. Folded away: most people turn them for the whole model. */
export function Bands({ bands, blocks, onChange }: Props) {
  const { t } = useTranslation();
  const set = (at: number, fields: Partial<Band>) =>
    onChange(bands.map((band, each) => (each === at ? { ...band, ...fields } : band)));
  return (
    <Fold title={t('dials.bands')} mark={turnedBands(bands).length > 0}>
      <Stack gap="sm">
        <Text size="xs" c="dimmed">
          {t(blocks ? 'dials.bandsBlocks' : 'dials.bandsText')}
        </Text>
        {bands.map((band, at) => (
          <div key={at} className={css.band} role="group" aria-label={t('dials.band', { number: at + 1 })}>
            <TextInput
              size="xs"
              className={css.layers}
              label={t('dials.bandLayers')}
              placeholder={blocks ? 'up.1-3' : '0-7'}
              value={band.layers}
              onChange={(event) => set(at, { layers: event.currentTarget.value })}
            />
            {DIALS.map((dial) => (
              <NumberInput
                key={dial}
                size="xs"
                label={t(`dials.${dial}`)}
                value={band[dial]}
                onChange={(value) => typeof value === 'number' && set(at, { [dial]: value })}
                min={dial === 'eps' ? 0.000001 : 0}
                max={dial === 'eps' ? 1_000_000 : 100}
                step={dial === 'eps' ? 10 : 0.05}
                hideControls
              />
            ))}
            <ActionIcon
              variant="subtle"
              color="gray"
              size={30}
              onClick={() => onChange(bands.filter((_, each) => each !== at))}
              aria-label={t('dials.bandRemove', { number: at + 1 })}
            >
              <Icon name="trash" size={17} />
            </ActionIcon>
          </div>
        ))}
        {bands.length < MOST_BANDS ? (
          <Button
            size="compact-sm"
            variant="subtle"
            className={css.add}
            leftSection={<Icon name="plus" size={16} />}
            onClick={() => onChange([...bands, { ...NEUTRAL, layers: '' }])}
          >
            {t('dials.bandAdd')}
          </Button>
        ) : null}
      </Stack>
    </Fold>
  );
}

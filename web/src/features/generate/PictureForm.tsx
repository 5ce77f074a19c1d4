import { Fold } from '@/components/Fold';
import { Icon } from '@/components/Icon';
import {
  Button,
  FileButton,
  NumberInput,
  Select,
  Slider,
  Stack,
  Switch,
  Text,
  Textarea,
  TextInput,
} from '@mantine/core';
import { useTranslation } from 'react-i18next';
import css from './Pictures.module.css';
import { isSize, MOST_PICTURES, SCHEDULERS, type PictureSettings } from './pictures';

interface Props {
  picture: PictureSettings;
  onChange: (picture: PictureSettings) => void;
}

export function PictureForm({ picture, onChange }: Props) {
  const { t } = useTranslation();
  const set = (fields: Partial<PictureSettings>) => onChange({ ...picture, ...fields });
  const number = (field: 'steps' | 'guidance' | 'n' | 'previews' | 'selfAttention' | 'crossAttention') => ({
    label: t(`pictures.${field}`),
    value: picture[field],
    onChange: (value: number | string) => typeof value === 'number' && set({ [field]: value }),
  });
  return (
    <Stack gap="xs">
      <Textarea
        label={t('pictures.negative')}
        description={t('pictures.negativeText')}
        value={picture.negative}
        onChange={(event) => set({ negative: event.currentTarget.value })}
        autosize
        minRows={1}
        maxRows={4}
      />
      <NumberInput
        label={t('pictures.seed')}
        description={t('pictures.seedText')}
        placeholder={t('pictures.seedAny')}
        value={picture.seed ?? ''}
        onChange={(value) => set({ seed: typeof value === 'number' ? value : null })}
        min={0}
        max={2 ** 53 - 1}
        allowDecimal={false}
        hideControls
      />
      <StartPicture picture={picture} set={set} />
      <Fold title={t('pictures.more')}>
        <Stack gap="sm">
          <NumberInput {...number('n')} min={1} max={MOST_PICTURES} allowDecimal={false} />
          <TextInput
            label={t('pictures.size')}
            description={t('pictures.sizeText')}
            placeholder={t('pictures.sizeOwn')}
            value={picture.size}
            error={isSize(picture.size) ? null : t('pictures.sizeWrong')}
            onChange={(event) => set({ size: event.currentTarget.value.trim().replace('×', 'x') })}
          />
          <NumberInput
            {...number('steps')}
            description={t('pictures.stepsText')}
            min={1}
            max={200}
            allowDecimal={false}
          />
          <Switch
            label={t('pictures.fast')}
            description={t('pictures.fastText')}
            checked={picture.fast}
            onChange={(event) => set({ fast: event.currentTarget.checked })}
          />
          <NumberInput {...number('guidance')} description={t('pictures.guidanceText')} min={0} max={100} step={0.5} />
          <Select
            label={t('pictures.scheduler')}
            value={picture.scheduler ?? ''}
            onChange={(name) => set({ scheduler: name || null })}
            data={[{ value: '', label: t('pictures.schedulerOwn') }, ...SCHEDULERS]}
            allowDeselect={false}
          />
          <NumberInput
            {...number('previews')}
            description={t('pictures.previewsText')}
            min={0}
            max={10}
            allowDecimal={false}
          />
          <NumberInput
            {...number('selfAttention')}
            description={t('pictures.attentionText')}
            min={0}
            max={100}
            step={0.05}
          />
          <NumberInput {...number('crossAttention')} min={0} max={100} step={0.05} />
        </Stack>
      </Fold>
    </Stack>
  );
}

function StartPicture({ picture, set }: { picture: PictureSettings; set: (fields: Partial<PictureSettings>) => void }) {
  const { t } = useTranslation();
  const read = (file: File | null) => {
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => typeof reader.result === 'string' && set({ start: reader.result });
    reader.readAsDataURL(file);
  };
  return (
    <div className={css.start}>
      <Text size="sm" fw={500}>
        {t('pictures.start')}
      </Text>
      {picture.start ? (
        <>
          <div className={css.startRow}>
            <img className={css.thumb} src={picture.start} alt={t('pictures.start')} />
            <Button size="compact-sm" variant="subtle" color="gray" onClick={() => set({ start: null })}>
              {t('pictures.startRemove')}
            </Button>
          </div>
          <Text size="xs" c="dimmed">
            {t('pictures.strengthText')}
          </Text>
          <Slider
            min={0.05}
            max={1}
            step={0.05}
            value={picture.strength}
            onChange={(strength) => set({ strength })}
            label={(value) => value.toFixed(2)}
            thumbLabel={t('pictures.strength')}
            size="sm"
            thumbSize={20}
          />
        </>
      ) : (
        <FileButton onChange={read} accept="image/png,image/jpeg,image/webp">
          {(props) => (
            <Button
              {...props}
              size="compact-sm"
              variant="subtle"
              className={css.add}
              leftSection={<Icon name="upload" size={16} />}
            >
              {t('pictures.startChoose')}
            </Button>
          )}
        </FileButton>
      )}
    </div>
  );
}

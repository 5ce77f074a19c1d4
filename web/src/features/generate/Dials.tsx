import { Icon } from '@/components/Icon';
import { ActionIcon, Button, Slider, Text, Title } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { DialPicture } from './DialPicture';
import css from './Dials.module.css';
import {
  DIALS,
  EPS_EXPONENT,
  format,
  fromPosition,
  GAIN,
  isNeutral,
  NEUTRAL,
  toPosition,
  type Dial,
  type DialValues,
} from './dials';

const EPS_MARKS = [-2, 0, 2, 3, 4].map((value) => ({
  value,
  label: { [-2]: '0.01', 0: '1', 2: '100', 3: '1k', 4: '10k' }[value],
}));
const GAIN_MARKS = [0.5, 0.8, 1, 1.2, 1.5].map((value) => ({ value, label: String(value) }));

interface Props {
  values: DialValues;
  image: boolean; // of a model that draws
  onChange: (values: DialValues) => void;
}

export function Dials({ values, image, onChange }: Props) {
  const { t } = useTranslation();
  return (
    <section className={css.dials} aria-label={t('dials.title')}>
      <div className={css.head}>
        <Title order={2} size="h3">
          {t('dials.title')}
        </Title>
        {isNeutral(values) ? (
          <Text size="xs" c="dimmed">
            {t('dials.plain')}
          </Text>
        ) : (
          <Button size="compact-xs" variant="subtle" onClick={() => onChange(NEUTRAL)}>
            {t('dials.resetAll')}
          </Button>
        )}
      </div>
      {DIALS.map((dial) => (
        <OneDial
          key={dial}
          dial={dial}
          value={values[dial]}
          text={t(image ? `dials.${dial}_drawn` : `dials.${dial}_text`)}
          onChange={(value) => onChange({ ...values, [dial]: value })}
        />
      ))}
    </section>
  );
}

interface DialProps {
  dial: Dial;
  value: number;
  text: string;
  onChange: (value: number) => void;
}

function OneDial({ dial, value, text, onChange }: DialProps) {
  const { t } = useTranslation();
  const logarithmic = dial === 'eps';
  const range = logarithmic ? EPS_EXPONENT : GAIN;
  const say = (position: number) => format(dial, fromPosition(dial, position));
  return (
    <div className={css.dial}>
      <div className={css.top}>
        <DialPicture dial={dial} value={value} />
        <div className={css.words}>
          <div className={css.line}>
            <Text fw={650} span>
              {t(`dials.${dial}`)}
            </Text>
            <Text size="xs" c="dimmed" span>
              {t(`dials.${dial}_name`)}
            </Text>
            <output className={css.value} data-turned={value !== 1}>
              {format(dial, value)}
            </output>
            <ActionIcon
              variant="subtle"
              color="gray"
              size={24}
              className={value === 1 ? css.hidden : undefined}
              onClick={() => onChange(1)}
              aria-label={t('dials.reset', { dial: t(`dials.${dial}`) })}
            >
              <Icon name="retry" size={15} />
            </ActionIcon>
          </div>
          <Text size="xs" c="dimmed" lh={1.45}>
            {text}
          </Text>
        </div>
      </div>
      <Slider
        className={logarithmic ? css.slider : `${css.slider} ${css.gain}`}
        min={range.min}
        max={range.max}
        step={range.step}
        value={toPosition(dial, value)}
        onChange={(position) => onChange(fromPosition(dial, position))}
        marks={logarithmic ? EPS_MARKS : GAIN_MARKS}
        startPointValue={logarithmic ? 0 : 1}
        label={say}
        thumbLabel={`${t(`dials.${dial}`)} · ${t(`dials.${dial}_name`)}`}
        thumbValueText={say}
        size="sm"
        thumbSize={20}
      />
    </div>
  );
}
